//! What do all processors of L0 share? The machine as it was found at boot: what L1 sees of memory,
//! EPT01, what the processors can do and what L1 is offered of it.

use alloc::sync::Arc;

use arrayvec::ArrayVec;
use nvmx::caps::{Caps, HardwareCaps};
use nvmx::engine::Nested;
use nvmx::paging::AddressSizes;
use nvmx::shootdown::Shootdown;
use nvmx::tracking::Tracked;
use spin::{Mutex, Once};

use crate::ept01::Ept01;
use crate::options::Options;
use crate::phys::{MemoryMap, Span};

/// RAM areas of L1 that are told apart; more are not L1's RAM for the VMX structures that L0 reads.
const MAX_RAM: usize = 32;

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// What the user asked for.
    pub(crate) options: Options,
    /// RAM of L1: usable memory and ACPI's, adjacent areas as one, the largest first.
    ram: ArrayVec<Span, MAX_RAM>,
    /// L0's own memory.
    pub(crate) own: Span,
    /// What L1 is offered of VMX.
    pub(crate) caps: Caps,
    /// The engine's part that all processors share.
    pub(crate) nested: Mutex<Nested>,
    /// Which processors have flushed since what.
    pub(crate) shootdown: Arc<Shootdown>,
    /// Pages of L1 whose writes exit.
    pub(crate) tracked: Arc<Tracked>,
    /// What the processors have of VMX.
    pub(crate) hardware: HardwareCaps,
    /// What CPUID tells L1 about addresses.
    pub(crate) sizes: AddressSizes,
    /// Whether L1 has several processors.
    pub(crate) is_smp: bool,
    /// L1's address space.
    pub(crate) ept01: Mutex<Ept01>,
}

static MACHINE: Once<Machine> = Once::new();

impl Machine {
    /// Describes the machine. `map` is L1's memory map.
    pub(crate) fn new(
        options: Options,
        map: &MemoryMap,
        nested: Nested,
        hardware: HardwareCaps,
        ept01: Ept01,
        sizes: AddressSizes,
        is_smp: bool,
    ) -> Self {
        let mut areas: ArrayVec<Span, { crate::phys::MAX_AREAS }> =
            map.areas().iter().filter(|a| matches!(a.kind, 1 | 3 | 4)).map(|a| a.span).collect();
        areas.sort_unstable_by_key(|span| span.start);
        let mut ram: ArrayVec<Span, MAX_RAM> = ArrayVec::new();
        for area in areas {
            match ram.last_mut() {
                Some(last) if last.end >= area.start => last.end = last.end.max(area.end),
                _ => {
                    let _ = ram.try_push(area);
                }
            }
        }
        // The engine asks for every access whether it is to RAM: most are to the largest area.
        ram.sort_unstable_by_key(|span| core::cmp::Reverse(span.len()));
        Self {
            options,
            ram,
            own: crate::region::own(),
            caps: nested.caps().clone(),
            shootdown: nested.shootdown().clone(),
            tracked: nested.tracked().clone(),
            nested: Mutex::new(nested),
            hardware,
            sizes,
            is_smp,
            ept01: Mutex::new(ept01),
        }
    }

    /// Makes `machine` the one.
    pub(crate) fn install(machine: Self) -> &'static Self {
        MACHINE.call_once(|| machine)
    }

    /// Whether all of `span` is RAM of L1.
    pub(crate) fn is_ram(&self, span: Span) -> bool {
        self.ram.iter().any(|ram| ram.contains(span))
    }
}
