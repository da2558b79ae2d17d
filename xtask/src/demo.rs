//! What does nvmx do, shown to somebody who sees it for the first time? The demo: L2 switches EPT
//! views natively, and under nvmx in two ways, and what each cost is put side by side.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tabled::{
    builder::Builder,
    settings::{Alignment, Style, object::Columns},
};

use crate::{
    bochs::{Bochs, Machine},
    boot::{Boot, L0},
    images,
    run::{Run, Until},
    serial::Demo,
    workspace::Workspace,
};

/// The ways to boot the demo: column title, what is told meanwhile, the hypervisor's options.
const WAYS: [(&str, &str, Option<&str>); 3] = [
    ("native", "L1 on the bare machine, no nvmx", None),
    ("vmfunc=emulated", "L1 under nvmx: a switch reuses a cached root", Some("vmfunc=emulated")),
    ("vmfunc=reload", "L1 under nvmx: a switch discards all roots", Some("vmfunc=reload")),
];

/// Boots the demo each way and prints the table. The images are built already.
pub(crate) fn demo(
    workspace: &Workspace,
    bochs: &Bochs,
    machine: Machine,
    timeout: Duration,
) -> Result<()> {
    let mut demos = Vec::new();
    for (number, (title, told, options)) in WAYS.iter().enumerate() {
        println!("[{}/{}] booting {told}", number + 1, WAYS.len());
        let started = Instant::now();
        let run = Run {
            name: &format!("demo-{}", title.trim_start_matches("vmfunc=")),
            boot: Boot {
                l0: options.map(|options| L0 {
                    image: workspace.image(images::HYPERVISOR),
                    options: options.to_owned(),
                }),
                l1: Some(workspace.image(images::DEMO)),
                cmdline: String::new(),
                modules: Vec::new(),
            },
            machine,
            until: Until::Verdict,
            timeout,
            show: false,
        };
        let outcome = run.make(workspace, bochs)?;
        let folder = outcome.folder.clone();
        let demo = Demo::parse(&outcome.into_result()?);
        if let Err(reason) = check(&demo) {
            bail!("{title}: {reason}\nlogs kept in {}", folder.display());
        }
        println!(
            "      L2 switched between {} views, and read the right value in each ({:.1} s)",
            demo.views.len(),
            started.elapsed().as_secs_f64()
        );
        demos.push(demo);
    }
    ensure!(
        demos.iter().all(|demo| demo.views == demos[0].views),
        "L2 did not read the same natively and under nvmx"
    );
    println!("\n{}", table(&demos));
    println!(
        "A view is one EPT: L1's map of its guest's memory. In each, the same address of L2 shows\n\
         another page. L2 goes from one to the next with the VMFUNC instruction; a switch counts\n\
         with the load that follows it, in instructions executed by the processor."
    );
    println!("demo: ok");
    Ok(())
}

/// Whether the guest showed what it was to show.
fn check(demo: &Demo) -> Result<(), String> {
    if !demo.done {
        return Err("the demo did not come to its end".to_owned());
    }
    if demo.views.len() < 2 {
        return Err(format!("a switch needs two views, not {}", demo.views.len()));
    }
    if let Some(view) = demo.views.iter().find(|view| view.read != view.expected) {
        return Err(format!(
            "in view {} L2 read {:#x}, not {:#x}",
            view.number, view.read, view.expected
        ));
    }
    match demo.switch_instructions {
        Some(cost) if cost > 0.0 => Ok(()),
        _ => Err("the demo did not say what a switch costs".to_owned()),
    }
}

/// One column for each way, one line for each view, and the costs.
fn table(demos: &[Demo]) -> String {
    let mut table = Builder::default();
    table.push_record(std::iter::once("").chain(WAYS.iter().map(|(title, ..)| *title)));
    for (line, view) in demos[0].views.iter().enumerate() {
        let reads = demos.iter().map(|demo| format!("{:#x}", demo.views[line].read));
        table.push_record(std::iter::once(format!("L2 read in view {}", view.number)).chain(reads));
    }
    let costs = demos.iter().map(|demo| format_figure(demo.switch_instructions.unwrap_or(0.0)));
    table.push_record(std::iter::once("instructions per switch".to_owned()).chain(costs));
    table.build().with(Style::rounded()).modify(Columns::new(1..), Alignment::right()).to_string()
}

/// A count with the thousands apart, and one decimal place if it is not whole.
pub(crate) fn format_figure(value: f64) -> String {
    let text =
        if value.fract().abs() < 0.05 { format!("{value:.0}") } else { format!("{value:.1}") };
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serial::View;

    fn demo(read: u64) -> Demo {
        Demo {
            views: vec![
                View { number: 0, read, expected: 0xA0 },
                View { number: 1, read: 0xA1, expected: 0xA1 },
            ],
            switch_instructions: Some(1234.0),
            done: true,
        }
    }

    #[test]
    fn a_wrong_read_is_a_failure() {
        assert_eq!(check(&demo(0xA0)), Ok(()));
        assert!(check(&demo(0xA1)).is_err());
        assert!(check(&Demo { done: false, ..demo(0xA0) }).is_err());
        assert!(check(&Demo { views: vec![], ..demo(0xA0) }).is_err());
        assert!(check(&Demo { switch_instructions: None, ..demo(0xA0) }).is_err());
    }

    #[test]
    fn the_table_has_what_was_measured() {
        let text = table(&[demo(0xA0), demo(0xA0), demo(0xA0)]);
        for part in ["L2 read in view 1", "0xa1", "instructions per switch", "1,234", "native"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn figures() {
        assert_eq!(format_figure(5.0), "5");
        assert_eq!(format_figure(312.46), "312.5");
        assert_eq!(format_figure(1_234_567.0), "1,234,567");
    }
}
