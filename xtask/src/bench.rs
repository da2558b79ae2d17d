//! What does it cost, natively and under nvmx? Runs the benchmark guest each way and writes the
//! figures, in instructions, where later ones can be compared with them.

use std::{collections::BTreeMap, fs, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Serialize, Serializer};
use tabled::{
    builder::Builder,
    settings::{Alignment, Style, object::Columns},
};

use crate::{
    bochs::{Bochs, Machine},
    boot::{Boot, L0},
    demo::format_figure,
    images,
    run::{Run, Until},
    serial::parse_bench,
    workspace::Workspace,
};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Switches of EPT views with VMFUNC, and a VM exit's round trip.
    Vmfunc,
    /// Everything there is.
    All,
}

/// How long one way may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What an emulated switch may cost.
const SWITCH_BOUND: f64 = 1000.0;

/// What a switch may cost with 64 views, in terms of one with 2.
const RATIO_BOUND: f64 = 1.2;

/// One measured thing, in instructions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) name: String,
    /// Its cost on the bare machine.
    #[serde(serialize_with = "plain")]
    pub(crate) native: f64,
    /// Its cost under nvmx.
    #[serde(serialize_with = "plain")]
    pub(crate) nvmx: f64,
}

/// Whole numbers without a decimal point.
fn plain<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // Far above any count of instructions, and exact in both types.
    if value.fract() == 0.0 && (0.0..9e15).contains(value) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked")]
        serializer.serialize_u64(*value as u64)
    } else {
        serializer.serialize_f64(*value)
    }
}

/// Measures, prints a table and writes the figures. The images are built already.
pub(crate) fn bench(workspace: &Workspace, bochs: &Bochs, suite: Suite) -> Result<Vec<Figure>> {
    match suite {
        // There is one suite so far.
        Suite::Vmfunc | Suite::All => {}
    }
    let measure = |title: &str, options: Option<&str>| measure(workspace, bochs, title, options);
    // Instructions are counted, not time: running side by side changes nothing.
    let (native, emulated, reload) = thread::scope(|scope| {
        let native = scope.spawn(|| measure("native", None));
        let emulated = scope.spawn(|| measure("emulated", Some("vmfunc=emulated")));
        let reload = measure("reload", Some("vmfunc=reload"));
        (joined(native), joined(emulated), reload)
    });
    let figures = join(&native?, &emulated?, &reload?)?;

    let mut table = Builder::default();
    table.push_record(["instructions", "native", "nvmx"]);
    for figure in &figures {
        let (native, nvmx) = (format_figure(figure.native), format_figure(figure.nvmx));
        table.push_record([figure.name.clone(), native, nvmx]);
    }
    println!(
        "{}",
        table.build().with(Style::rounded()).modify(Columns::new(1..), Alignment::right())
    );
    let file = write(workspace, "vmfunc", &figures)?;
    println!("written to {}", file.display());
    Ok(figures)
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs the benchmark guest one way.
fn measure(
    workspace: &Workspace,
    bochs: &Bochs,
    title: &str,
    options: Option<&str>,
) -> Result<BTreeMap<String, f64>> {
    let run = Run {
        name: &format!("bench-{title}"),
        boot: Boot {
            l0: options.map(|options| L0 {
                image: workspace.image(images::HYPERVISOR),
                options: options.to_owned(),
            }),
            l1: Some(workspace.image(images::BENCH)),
            cmdline: String::new(),
            modules: Vec::new(),
        },
        machine: Machine::default(),
        until: Until::Verdict,
        timeout: TIMEOUT,
        show: false,
    };
    let serial = run.make(workspace, bochs)?.into_result().with_context(|| title.to_owned())?;
    Ok(parse_bench(&serial))
}

/// Puts the three runs' figures side by side: `switch_N` in both ways, everything else emulated.
fn join(
    native: &BTreeMap<String, f64>,
    emulated: &BTreeMap<String, f64>,
    reload: &BTreeMap<String, f64>,
) -> Result<Vec<Figure>> {
    for wanted in ["switch_2", "switch_64", "vmcall_round_trip"] {
        if !native.contains_key(wanted) {
            bail!("the benchmark guest did not measure {wanted}");
        }
    }
    let mut figures = Vec::new();
    let mut push = |name: String, measured: &str, nvmx: &BTreeMap<String, f64>| {
        let nvmx = *nvmx.get(measured).with_context(|| format!("no {measured} under nvmx"))?;
        figures.push(Figure { name, native: native[measured], nvmx });
        anyhow::Ok(())
    };
    let mut switches: Vec<u32> =
        native.keys().filter_map(|name| name.strip_prefix("switch_")?.parse().ok()).collect();
    switches.sort_unstable();
    for (way, nvmx) in [("emulated", emulated), ("reload", reload)] {
        for views in &switches {
            push(format!("switch_{way}_{views}"), &format!("switch_{views}"), nvmx)?;
        }
    }
    for name in native.keys() {
        let switch = name.strip_prefix("switch_").is_some_and(|n| n.parse::<u32>().is_ok());
        if !switch {
            push(name.clone(), name, emulated)?;
        }
    }
    Ok(figures)
}

fn write(workspace: &Workspace, suite: &str, figures: &[Figure]) -> Result<PathBuf> {
    let folder = workspace.target.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file = folder.join(format!("{suite}.json"));
    let text = serde_json::to_string_pretty(figures)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// What is above its bound, a line each.
pub(crate) fn exceeded(figures: &[Figure]) -> Vec<String> {
    let nvmx = |name: &str| {
        figures.iter().find(|figure| figure.name == name).map_or(f64::INFINITY, |found| found.nvmx)
    };
    let mut lines = Vec::new();
    let (few, many) = (nvmx("switch_emulated_2"), nvmx("switch_emulated_64"));
    for (views, cost) in [(2, few), (64, many)] {
        if cost > SWITCH_BOUND {
            lines.push(format!("switch_emulated_{views} costs {cost}, more than {SWITCH_BOUND}"));
        }
    }
    // Written so that two infinite costs don't count as equal.
    if !(many <= few * RATIO_BOUND && many.is_finite()) {
        lines.push(format!("64 views cost {many} a switch, more than {RATIO_BOUND} times {few}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(emulated_2: f64, emulated_64: f64) -> Vec<Figure> {
        let guest = |two, many| {
            BTreeMap::from([
                ("switch_2".to_owned(), two),
                ("switch_64".to_owned(), many),
                ("vmcall_round_trip".to_owned(), 312.5),
            ])
        };
        join(&guest(5.0, 5.0), &guest(emulated_2, emulated_64), &guest(2000.0, 2000.0))
            .expect("complete")
    }

    #[test]
    fn names_are_those_others_read() {
        let figures = figures(400.0, 410.0);
        let names: Vec<&str> = figures.iter().map(|figure| figure.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "switch_emulated_2",
                "switch_emulated_64",
                "switch_reload_2",
                "switch_reload_64",
                "vmcall_round_trip"
            ]
        );
        let json = serde_json::to_string(&figures[..1]).expect("serializes");
        assert_eq!(json, r#"[{"name":"switch_emulated_2","native":5,"nvmx":400}]"#);
        let json = serde_json::to_string(&figures[4]).expect("serializes");
        assert_eq!(json, r#"{"name":"vmcall_round_trip","native":312.5,"nvmx":312.5}"#);
    }

    #[test]
    fn a_missing_figure_is_an_error() {
        assert!(join(&BTreeMap::new(), &BTreeMap::new(), &BTreeMap::new()).is_err());
    }

    #[test]
    fn bounds() {
        assert_eq!(exceeded(&figures(400.0, 480.0)), Vec::<String>::new());
        assert_eq!(exceeded(&figures(400.0, 481.0)).len(), 1);
        assert_eq!(exceeded(&figures(1001.0, 1001.0)).len(), 2);
        assert_eq!(exceeded(&[]).len(), 3);
    }
}
