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
    /// What nested paging costs a page.
    Mmu,
    /// Everything there is.
    All,
}

/// How long one way may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What an emulated switch may cost.
const SWITCH_BOUND: f64 = 400.0;

/// What a switch may cost with 64 views, in terms of one with 2.
const RATIO_BOUND: f64 = 1.2;

/// What a page may cost.
const PAGE_BOUNDS: [(&str, f64); 6] = [
    ("first_read_4k", 100.0),
    ("first_write_4k", 100.0),
    ("write_after_read_4k", 20.0),
    ("first_read_4k_ad", 2500.0),
    ("first_write_4k_ad", 2500.0),
    ("reread_after_invept", 20.0),
];

/// How many pages of shadow tables a view may take that shares all but one path.
const VIEW_BOUND: f64 = 5.0;

/// What the benchmark guest measures of nested paging, in the order of the table.
const PAGE_FIGURES: [&str; 7] = [
    "first_read_4k",
    "first_write_4k",
    "write_after_read_4k",
    "first_read_4k_ad",
    "first_write_4k_ad",
    "reread_after_invept",
    "reread_after_one_change",
];

/// The figure that only nvmx has.
const VIEW_FIGURE: &str = "shadow_pages_per_view";

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

/// Measures, prints tables and writes the figures; the result is what is above its bound, a line
/// each. The images are built already.
pub(crate) fn bench(workspace: &Workspace, bochs: &Bochs, suite: Suite) -> Result<Vec<String>> {
    let mut exceeded = Vec::new();
    if matches!(suite, Suite::Vmfunc | Suite::All) {
        exceeded.extend(vmfunc(workspace, bochs)?);
    }
    if matches!(suite, Suite::Mmu | Suite::All) {
        exceeded.extend(mmu(workspace, bochs)?);
    }
    Ok(exceeded)
}

fn vmfunc(workspace: &Workspace, bochs: &Bochs) -> Result<Vec<String>> {
    let measure = |way: Way| measure(workspace, bochs, "vmfunc", way);
    // Instructions are counted, not time: running side by side changes nothing.
    let (native, emulated, reload) = thread::scope(|scope| {
        let native = scope.spawn(|| measure(NATIVE));
        let emulated = scope.spawn(|| measure(EMULATED));
        let reload = measure(("reload", Some("vmfunc=reload")));
        (joined(native), joined(emulated), reload)
    });
    let figures = join(&native?, &emulated?, &reload?)?;
    publish(workspace, "vmfunc", "instructions", &figures)?;
    Ok(switches_exceeded(&figures))
}

fn mmu(workspace: &Workspace, bochs: &Bochs) -> Result<Vec<String>> {
    let measure = |way: Way| measure(workspace, bochs, "mmu", way);
    let (native, nvmx) = thread::scope(|scope| {
        let native = scope.spawn(|| measure(NATIVE));
        let nvmx = measure(EMULATED);
        (joined(native), nvmx)
    });
    let nvmx = nvmx?;
    let figures = join_pages(&native?, &nvmx)?;
    publish(workspace, "mmu", "instructions a page", &figures)?;
    let pages = *nvmx.get(VIEW_FIGURE).with_context(|| format!("no {VIEW_FIGURE} under nvmx"))?;
    println!("{VIEW_FIGURE}: {pages}, of views that share all but the path to one page");
    Ok(pages_exceeded(&figures, pages))
}

/// Prints the table and writes the file of a suite.
fn publish(workspace: &Workspace, suite: &str, unit: &str, figures: &[Figure]) -> Result<()> {
    let mut table = Builder::default();
    table.push_record([unit, "native", "nvmx"]);
    for figure in figures {
        let (native, nvmx) = (format_figure(figure.native), format_figure(figure.nvmx));
        table.push_record([figure.name.clone(), native, nvmx]);
    }
    println!(
        "{}",
        table.build().with(Style::rounded()).modify(Columns::new(1..), Alignment::right())
    );
    let file = write(workspace, suite, figures)?;
    println!("written to {}", file.display());
    Ok(())
}

/// A name for the run, and the hypervisor's options, if it is there.
type Way = (&'static str, Option<&'static str>);

const NATIVE: Way = ("native", None);
const EMULATED: Way = ("emulated", Some("vmfunc=emulated"));

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs one suite of the benchmark guest one way.
fn measure(
    workspace: &Workspace,
    bochs: &Bochs,
    suite: &str,
    (way, options): Way,
) -> Result<BTreeMap<String, f64>> {
    let run = Run {
        name: &format!("bench-{suite}-{way}"),
        boot: Boot {
            l0: options.map(|options| L0 {
                image: workspace.image(images::HYPERVISOR),
                options: options.to_owned(),
            }),
            l1: Some(workspace.image(images::BENCH)),
            cmdline: format!("suite={suite}"),
            modules: Vec::new(),
        },
        machine: Machine::default(),
        until: Until::Verdict,
        timeout: TIMEOUT,
        show: false,
    };
    let outcome = run.make(workspace, bochs)?;
    let serial = outcome.into_result().with_context(|| format!("{suite}, {way}"))?;
    Ok(parse_bench(&serial))
}

/// Puts the three runs' figures side by side: `switch_N` in both ways, everything else emulated.
fn join(
    native: &BTreeMap<String, f64>,
    emulated: &BTreeMap<String, f64>,
    reload: &BTreeMap<String, f64>,
) -> Result<Vec<Figure>> {
    for wanted in ["switch_2", "switch_64", "switch_512", "vmcall_round_trip"] {
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

/// Puts the two runs' figures of nested paging side by side.
fn join_pages(native: &BTreeMap<String, f64>, nvmx: &BTreeMap<String, f64>) -> Result<Vec<Figure>> {
    let figure = |name: &str| {
        let native = *native.get(name).with_context(|| format!("no {name} natively"))?;
        let nvmx = *nvmx.get(name).with_context(|| format!("no {name} under nvmx"))?;
        Ok(Figure { name: name.to_owned(), native, nvmx })
    };
    PAGE_FIGURES.into_iter().map(figure).collect()
}

fn write(workspace: &Workspace, suite: &str, figures: &[Figure]) -> Result<PathBuf> {
    let folder = workspace.target.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file = folder.join(format!("{suite}.json"));
    let text = serde_json::to_string_pretty(figures)? + "\n";
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// A figure under nvmx; infinite, and so above any bound, if there is none.
fn under_nvmx(figures: &[Figure], name: &str) -> f64 {
    figures.iter().find(|figure| figure.name == name).map_or(f64::INFINITY, |found| found.nvmx)
}

/// What is above its bound, a line each.
fn switches_exceeded(figures: &[Figure]) -> Vec<String> {
    let nvmx = |name: &str| under_nvmx(figures, name);
    let mut lines = Vec::new();
    let (few, many) = (nvmx("switch_emulated_2"), nvmx("switch_emulated_64"));
    for views in [2, 64, 512] {
        let name = format!("switch_emulated_{views}");
        let cost = nvmx(&name);
        if cost > SWITCH_BOUND {
            lines.push(format!("{name} costs {cost}, more than {SWITCH_BOUND}"));
        }
    }
    // Written so that two infinite costs don't count as equal.
    if !(many <= few * RATIO_BOUND && many.is_finite()) {
        lines.push(format!("64 views cost {many} a switch, more than {RATIO_BOUND} times {few}"));
    }
    lines
}

/// What of nested paging is above its bound, a line each.
fn pages_exceeded(figures: &[Figure], pages_a_view: f64) -> Vec<String> {
    let costs = PAGE_BOUNDS.map(|(name, bound)| (name, under_nvmx(figures, name), bound));
    costs
        .into_iter()
        .chain([(VIEW_FIGURE, pages_a_view, VIEW_BOUND)])
        .filter(|(_, figure, bound)| figure > bound)
        .map(|(name, figure, bound)| format!("{name} is {figure}, more than {bound}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(emulated_2: f64, emulated_64: f64) -> Vec<Figure> {
        let guest = |two, many| {
            BTreeMap::from([
                ("switch_2".to_owned(), two),
                ("switch_64".to_owned(), many),
                ("switch_512".to_owned(), many),
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
                "switch_emulated_512",
                "switch_reload_2",
                "switch_reload_64",
                "switch_reload_512",
                "vmcall_round_trip"
            ]
        );
        let json = serde_json::to_string(&figures[..1]).expect("serializes");
        assert_eq!(json, r#"[{"name":"switch_emulated_2","native":5,"nvmx":400}]"#);
        let json = serde_json::to_string(&figures[6]).expect("serializes");
        assert_eq!(json, r#"{"name":"vmcall_round_trip","native":312.5,"nvmx":312.5}"#);
    }

    #[test]
    fn a_missing_figure_is_an_error() {
        assert!(join(&BTreeMap::new(), &BTreeMap::new(), &BTreeMap::new()).is_err());
    }

    #[test]
    fn bounds() {
        assert_eq!(switches_exceeded(&figures(300.0, 360.0)), Vec::<String>::new());
        assert_eq!(switches_exceeded(&figures(300.0, 361.0)).len(), 1);
        assert_eq!(switches_exceeded(&figures(401.0, 401.0)).len(), 3);
        assert_eq!(switches_exceeded(&[]).len(), 4);
    }

    #[test]
    fn pages_and_their_bounds() {
        let guest = |cost| PAGE_FIGURES.map(|name| (name.to_owned(), cost)).into();
        let figures = join_pages(&guest(4.2), &guest(7.5)).expect("complete");
        let names: Vec<&str> = figures.iter().map(|figure| figure.name.as_str()).collect();
        assert_eq!(names, PAGE_FIGURES);
        assert!(PAGE_BOUNDS.iter().all(|(name, _)| names.contains(name)));
        assert_eq!(pages_exceeded(&figures, 5.0), Vec::<String>::new());
        assert_eq!(pages_exceeded(&figures, 5.01).len(), 1);
        assert_eq!(pages_exceeded(&[], 4.0).len(), PAGE_BOUNDS.len());
        assert!(join_pages(&guest(4.2), &BTreeMap::new()).is_err());
    }
}
