//! Where are L1's VMCSs kept while L1 uses them?
//!
//! Keyed by physical address, not by processor: L1 may clear a VMCS on one processor and load it on
//! another. The cache is bounded; a VMCS that is evicted is written back to its region in L1's
//! memory, and read again later as values that L1 may have made of it what it likes.

use crate::host::L1Memory;
use crate::vmcs12::{LaunchState, Vmcs12};
use alloc::vec::Vec;
use vmx_defs::L1Gpa;

/// Number of a VMCS in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VmcsId(u32);

#[derive(Clone, Debug)]
struct Slot {
    region: Option<L1Gpa>,
    /// Whether it is some processor's current VMCS.
    in_use: bool,
    used: u64,
    vmcs: Vmcs12,
}

/// The VMCSs of L1 in use.
#[derive(Debug)]
pub(crate) struct VmcsCache {
    slots: Vec<Slot>,
    clock: u64,
}

impl VmcsCache {
    /// A cache of `len` VMCSs, which must be more than the number of processors: each holds one.
    pub(crate) fn new(len: usize) -> Self {
        let empty = Slot { region: None, in_use: false, used: 0, vmcs: Vmcs12::default() };
        Self { slots: alloc::vec![empty; len], clock: 0 }
    }

    fn find(&self, region: L1Gpa) -> Option<usize> {
        self.slots.iter().position(|slot| slot.region == Some(region))
    }

    /// VMPTRLD: the VMCS at `region`, to be a processor's current one. `None` where it is another
    /// processor's, which the architecture leaves undefined (SDM Vol. 3C, "Overview" of
    /// virtual-machine control structures: it may be active on one at a time). Here one of them
    /// could change, while the other runs L2, what its VM entry has checked.
    pub(crate) fn acquire(&mut self, memory: &mut impl L1Memory, region: L1Gpa) -> Option<VmcsId> {
        self.clock += 1;
        let number = match self.find(region) {
            Some(number) if self.slots.get(number).is_some_and(|slot| slot.in_use) => return None,
            Some(number) => number,
            None => {
                let free = self.slots.iter().enumerate().filter(|(_, slot)| !slot.in_use);
                let (number, _) = free.min_by_key(|(_, slot)| slot.used)?;
                let slot = self.slots.get_mut(number)?;
                if let Some(old) = slot.region {
                    slot.vmcs.store(memory, old);
                }
                slot.region = Some(region);
                slot.vmcs = Vmcs12::load(memory, region);
                number
            }
        };
        let slot = self.slots.get_mut(number)?;
        slot.in_use = true;
        slot.used = self.clock;
        Some(VmcsId(number as u32))
    }

    /// The VMCS is no longer its processor's current one.
    pub(crate) fn release(&mut self, id: VmcsId) {
        if let Some(slot) = self.slots.get_mut(id.0 as usize) {
            slot.in_use = false;
        }
    }

    /// VMCLEAR: data to memory, launch state to clear (SDM Vol. 3C, "VMCLEAR—Clear Virtual-Machine
    /// Control Structure"). Where another processor still has the VMCS current, which the
    /// architecture forbids, the copy stays for it.
    pub(crate) fn clear(&mut self, memory: &mut impl L1Memory, region: L1Gpa) {
        match self.find(region) {
            Some(number) => {
                let Some(slot) = self.slots.get_mut(number) else { return };
                slot.vmcs.launch_state = LaunchState::Clear;
                slot.vmcs.store(memory, region);
                if !slot.in_use {
                    slot.region = None;
                    slot.used = 0;
                }
            }
            None => Vmcs12::clear_in_memory(memory, region),
        }
    }

    #[inline]
    pub(crate) fn get(&self, id: VmcsId) -> Option<&Vmcs12> {
        self.slots.get(id.0 as usize).map(|slot| &slot.vmcs)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, id: VmcsId) -> Option<&mut Vmcs12> {
        self.slots.get_mut(id.0 as usize).map(|slot| &mut slot.vmcs)
    }
}
