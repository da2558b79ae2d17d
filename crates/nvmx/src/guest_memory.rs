//! What does the guest that runs find at one of its physical addresses?
//!
//! L1's is what EPT01 has there; L2's lies where L1's EPT takes it, or is L1's where it has none. For
//! hosts that have to look at what L2 executes, as they do for L1.

use crate::engine::{Nested, Processor};
use crate::ept::{Walk, WalkRules, walk};
use crate::host::{L1Mapping, L1Memory};
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::{EptPermissions, Eptp, L1Gpa, L2Gpa};

/// How physical addresses of the guest that runs become L1's.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestSpace(Option<(WalkRules, Eptp)>);

impl GuestSpace {
    /// The address of L1 at which the guest finds its address `gpa`; `None` where it can't read.
    /// Sets no flags.
    pub fn find(self, memory: &mut impl L1Memory, gpa: L2Gpa) -> Option<L1Gpa> {
        let Some((rules, eptp)) = self.0 else { return Some(gpa.without_ept()) };
        if !gpa.fits(48) {
            return None;
        }
        match walk(memory, rules, eptp, gpa) {
            Walk::Page(path) if path.permissions().contains(EptPermissions::READ) => {
                Some(path.target(gpa))
            }
            _ => None,
        }
    }
}

impl Nested {
    /// How physical addresses become L1's for the guest that `processor` runs.
    pub fn guest_space(&self, processor: &Processor) -> GuestSpace {
        let vmcs = self.vmcs12(processor).filter(|vmcs| processor.runs_l2() && vmcs.has_ept());
        let caps = &self.config.caps;
        let rules = WalkRules { caps: caps.ept_vpid, physical_width: caps.physical_width };
        GuestSpace(vmcs.map(|vmcs| (rules, vmcs.eptp())))
    }
}

/// The memory of the guest that runs, to be walked by [its paging](crate::paging::Paging), which
/// takes all addresses for L1's: here they are those of `space`. What the guest can't read is ones,
/// and is not written.
#[derive(Debug)]
pub struct GuestMemory<'a, M> {
    /// L1's memory.
    pub memory: &'a mut M,
    /// What its addresses mean.
    pub space: GuestSpace,
}

impl<M: L1Memory> GuestMemory<'_, M> {
    fn find(&mut self, gpa: L1Gpa) -> Option<L1Gpa> {
        self.space.find(self.memory, L2Gpa::new(gpa.as_u64()))
    }

    /// The bytes from `gpa` to the end of its page, `len` at most.
    fn in_page(gpa: L1Gpa, len: usize) -> usize {
        ((PAGE_SIZE - gpa.page_offset()) as usize).min(len)
    }
}

impl<M: L1Memory> L1Memory for GuestMemory<'_, M> {
    fn read(&mut self, mut gpa: L1Gpa, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            let len = Self::in_page(gpa, buffer.len());
            let Some((now, rest)) = buffer.split_at_mut_checked(len) else { return };
            match self.find(gpa) {
                Some(at) => self.memory.read(at, now),
                None => now.fill(0xff),
            }
            buffer = rest;
            gpa = L1Gpa::new(gpa.as_u64().wrapping_add(len as u64));
        }
    }

    fn write(&mut self, mut gpa: L1Gpa, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = Self::in_page(gpa, bytes.len());
            let Some((now, rest)) = bytes.split_at_checked(len) else { return };
            if let Some(at) = self.find(gpa) {
                self.memory.write(at, now);
            }
            bytes = rest;
            gpa = L1Gpa::new(gpa.as_u64().wrapping_add(len as u64));
        }
    }

    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        self.find(gpa).map_or(u64::MAX, |at| self.memory.read_u64(at))
    }

    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        if let Some(at) = self.find(gpa) {
            self.memory.write_u64(at, value);
        }
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.find(gpa).map_or(u64::MAX, |at| self.memory.compare_exchange_u64(at, old, new))
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.find(gpa).map_or(u32::MAX, |at| self.memory.compare_exchange_u32(at, old, new))
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        match self.find(gpa) {
            Some(at) => self.memory.read_entries(at, entries),
            None => entries.fill(u64::MAX),
        }
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        // What is nowhere in L1's space is past its end.
        let at = self.find(gpa).unwrap_or(L1Gpa::new(u64::MAX));
        self.memory.translate(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{Access, Paging};
    use crate::testing::rig::{End, Rig, vmcs02};
    use vmx_defs::{ExitReason, Field, Gva};

    /// L2's EPT, and its page tables in L1's memory.
    const ROOT: u64 = 0xc_0000;
    const TABLES: u64 = 0x8_0000;

    #[test]
    fn paging_of_l2_is_walked_through_l1s_ept() {
        let mut rig = Rig::ready();
        rig.vmwrite(0, Field::EPT_POINTER, ROOT | 3 << 3 | 6);
        // L2's pages 0 to 3 are its tables, 5 and 6 what they map.
        for (gpa, page) in [(0, 3), (1, 1), (2, 0), (3, 2), (5, 8), (6, 7)] {
            rig.map(ROOT, gpa << 12, TABLES + (page << 12), 7 | 6 << 3);
        }
        // 4-level paging from L2's page 0, linear addresses from 0 on.
        for (page, entry) in [(3, 0x1000), (1, 0x2000), (0, 0x3000)] {
            rig.host.ram.write_u64(L1Gpa::new(TABLES + (page << 12)), entry | 7);
        }
        for (at, page) in [(0, 5), (1, 6), (2, 9)] {
            let entry = L1Gpa::new(TABLES + 0x2000 + 8 * at);
            rig.host.ram.write_u64(entry, (page << 12) | 7);
        }
        rig.host.ram.write(L1Gpa::new(TABLES + 0x8ffe), &[1, 2]);
        rig.host.ram.write(L1Gpa::new(TABLES + 0x7000), &[3, 4]);
        let space = |rig: &Rig| rig.nested.guest_space(&rig.cpus[0]);
        assert_eq!(space(&rig).find(&mut rig.host, L2Gpa::new(0x5123)), Some(L1Gpa::new(0x5123)));
        assert_eq!(rig.vmwrite(0, Field::GUEST_CR3, 0), End::Succeed);
        assert_eq!(rig.launch(0), End::Entered);
        let space = space(&rig);
        let at = space.find(&mut rig.host, L2Gpa::new(0x5123));
        assert_eq!(at, Some(L1Gpa::new(TABLES + 0x8123)));
        assert_eq!(space.find(&mut rig.host, L2Gpa::new(0x9000)), None);
        assert_eq!(space.find(&mut rig.host, L2Gpa::new(1 << 50)), None);

        rig.host.current = vmcs02(0);
        let paging = Paging::read(&mut rig.host, rig.nested.config.sizes).unwrap();
        let mut memory = GuestMemory { memory: &mut rig.host, space };
        let mut bytes = [0; 4];
        memory.read(L1Gpa::new(0x5ffe), &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        let found = paging.translate(&mut memory, Gva::new(0x1004), Access::Write);
        assert_eq!(found, Ok(L1Gpa::new(0x6004)));
        // Accessed and dirty, in L1's memory.
        assert_eq!(memory.read_u64(L1Gpa::new(0x3008)), 0x6067);
        assert_eq!(rig.host.ram.read_u64(L1Gpa::new(TABLES + 0x2008)), 0x6067);
        let mut memory = GuestMemory { memory: &mut rig.host, space };
        memory.write(L1Gpa::new(0x5fff), &[9, 8]);
        memory.write_u64(L1Gpa::new(0x9000), 7);
        memory.read(L1Gpa::new(0x5ffe), &mut bytes);
        assert_eq!(bytes, [1, 9, 8, 4]);
        memory.read(L1Gpa::new(0x8ffe), &mut bytes);
        assert_eq!(bytes, [0xff; 4], "nowhere");
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    }
}
