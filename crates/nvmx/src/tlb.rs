//! Which VPID does the processor run L2 with, and what does each event have to flush?
//!
//! L1 counts on the tags of SDM Vol. 3C, "Caching Translation Information": mappings of its VPIDs
//! survive its VM entries and exits, and those of VPID 0000H, under which it runs L2 without VPID
//! and itself in root operation, do not. Each VPID of L1 in use has a vpid02 of its own, and one
//! vpid02 stands for L2 without VPID. The mapping is a processor's own, since INVVPID and the tags
//! are: one processor never has to flush for another.

use crate::host::{Host, HostResult, InvVpid};
use vmx_defs::Gva;

/// VPID that the host runs L1 with.
pub const VPID01: u16 = 1;

/// The vpid02 that stands for L2 with VPID disabled.
const WITHOUT_VPID: u16 = 2;

/// First vpid02 of the pool.
const POOL: u16 = 3;

/// Number of vpid02s in the pool: VPIDs of L1 that are in use at once on a processor.
const POOL_LEN: usize = 32;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The VPID of L1, or 0 for none: L1 can't enter L2 with VPID 0000H.
    vpid12: u16,
    used: u64,
}

/// The VPIDs of one processor.
#[derive(Clone, Debug)]
pub(crate) struct Vpids {
    slots: [Slot; POOL_LEN],
    clock: u64,
    /// INVVPIDs executed.
    pub(crate) flushes: u64,
}

impl Vpids {
    pub(crate) const fn new() -> Self {
        Self { slots: [Slot { vpid12: 0, used: 0 }; POOL_LEN], clock: 0, flushes: 0 }
    }

    #[inline(always)]
    fn flush(&mut self, host: &mut impl Host, scope: InvVpid) -> HostResult {
        self.flushes += 1;
        host.invvpid(scope)
    }

    fn find(&self, vpid12: u16) -> Option<u16> {
        let position = self.slots.iter().position(|slot| slot.vpid12 == vpid12)?;
        Some(POOL + position as u16)
    }

    /// L1 enters L2: the vpid02 to run with. `vpid12` is `None` where VPID is disabled; then the
    /// transition invalidates the mappings of VPID 0000H (SDM Vol. 3C, "Operations that Invalidate
    /// Cached Mappings": VM entry and exit with "enable VPID" 0).
    pub(crate) fn enter(&mut self, host: &mut impl Host, vpid12: Option<u16>) -> HostResult<u16> {
        let Some(vpid12) = vpid12 else {
            self.flush(host, InvVpid::Single(WITHOUT_VPID))?;
            return Ok(WITHOUT_VPID);
        };
        self.clock += 1;
        let clock = self.clock;
        if let Some((number, slot)) =
            self.slots.iter_mut().enumerate().find(|(_, slot)| slot.vpid12 == vpid12)
        {
            slot.used = clock;
            return Ok(POOL + number as u16);
        }
        let oldest = self.slots.iter_mut().enumerate().min_by_key(|(_, slot)| slot.used);
        let Some((number, slot)) = oldest else { return Ok(WITHOUT_VPID) };
        *slot = Slot { vpid12, used: clock };
        let vpid02 = POOL + number as u16;
        // What the vpid02's last owner cached must be gone before its first use.
        self.flush(host, InvVpid::Single(vpid02))?;
        Ok(vpid02)
    }

    /// L2 exits to L1: with VPID disabled, L1's own mappings go too, since in root operation it
    /// runs under the same VPID 0000H.
    pub(crate) fn leave(&mut self, host: &mut impl Host, has_vpid: bool) -> HostResult {
        if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(VPID01)) }
    }

    /// VMFUNC switched the EPTP: with VPID disabled, the combined mappings of VPID 0000H go, for
    /// all PCIDs and EP4TAs, also where the EPTP is the one in use (S4; SDM Vol. 3C, "EPTP
    /// Switching"). With VPID enabled nothing does.
    #[inline]
    pub(crate) fn switched(&mut self, host: &mut impl Host, has_vpid: bool) -> HostResult {
        if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(WITHOUT_VPID)) }
    }

    /// L1 executed INVVPID, its operands already checked.
    pub(crate) fn invalidate(&mut self, host: &mut impl Host, scope: InvVpid) -> HostResult {
        match scope {
            InvVpid::All => {
                for number in 0..POOL_LEN {
                    if self.slots.get(number).is_some_and(|slot| slot.vpid12 != 0) {
                        self.flush(host, InvVpid::Single(POOL + number as u16))?;
                    }
                }
                Ok(())
            }
            InvVpid::Address(vpid12, at) => self
                .for_vpid02(host, vpid12, |vpid02| InvVpid::Address(vpid02, Gva::new(at.as_u64()))),
            InvVpid::Single(vpid12) => self.for_vpid02(host, vpid12, InvVpid::Single),
            InvVpid::RetainGlobals(vpid12) => self.for_vpid02(host, vpid12, InvVpid::RetainGlobals),
        }
    }

    fn for_vpid02(
        &mut self,
        host: &mut impl Host,
        vpid12: u16,
        scope: impl FnOnce(u16) -> InvVpid,
    ) -> HostResult {
        // A VPID that has no vpid02 has nothing cached: its next one is flushed before use.
        match self.find(vpid12) {
            Some(vpid02) if vpid12 != 0 => self.flush(host, scope(vpid02)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHost;
    use alloc::vec::Vec;

    fn enter(vpids: &mut Vpids, host: &mut TestHost, vpid12: u16) -> u16 {
        vpids.enter(host, Some(vpid12)).unwrap()
    }

    #[test]
    fn each_vpid_in_use_has_one_of_its_own_and_alternating_flushes_nothing() {
        let (mut vpids, mut host) = (Vpids::new(), TestHost::new(0));
        let first: Vec<u16> = (1..=32).map(|n| enter(&mut vpids, &mut host, n * 7)).collect();
        for (n, vpid02) in first.iter().enumerate() {
            assert!(*vpid02 > WITHOUT_VPID);
            assert_eq!(first.iter().position(|other| other == vpid02), Some(n));
        }
        // Each once, before its first use: an earlier owner may have left something.
        assert_eq!(host.invvpids.len(), 32);
        for _ in 0..3 {
            for (n, vpid02) in first.iter().enumerate() {
                assert_eq!(enter(&mut vpids, &mut host, (n as u16 + 1) * 7), *vpid02);
            }
        }
        assert_eq!(host.invvpids.len(), 32);
    }

    #[test]
    fn the_least_recently_used_is_recycled_and_flushed_before_its_next_use() {
        let (mut vpids, mut host) = (Vpids::new(), TestHost::new(0));
        for n in 1..=32 {
            enter(&mut vpids, &mut host, n);
        }
        enter(&mut vpids, &mut host, 1);
        let second = vpids.find(2).unwrap();
        host.invvpids.clear();
        assert_eq!(enter(&mut vpids, &mut host, 1000), second);
        assert_eq!(host.invvpids, [InvVpid::Single(second)]);
        assert_eq!(vpids.find(2), None);
        // What L1 invalidates for the VPID that lost its vpid02 is gone already.
        host.invvpids.clear();
        vpids.invalidate(&mut host, InvVpid::Single(2)).unwrap();
        assert!(host.invvpids.is_empty());
        vpids.invalidate(&mut host, InvVpid::Single(1000)).unwrap();
        assert_eq!(host.invvpids, [InvVpid::Single(second)]);
    }

    #[test]
    fn all_context_invvpid_leaves_vpid_0000h_and_l1_alone() {
        let (mut vpids, mut host) = (Vpids::new(), TestHost::new(0));
        vpids.enter(&mut host, None).unwrap();
        let two = [5, 0xffff].map(|n| enter(&mut vpids, &mut host, n));
        host.invvpids.clear();
        vpids.invalidate(&mut host, InvVpid::All).unwrap();
        assert_eq!(host.invvpids, two.map(InvVpid::Single));
        host.invvpids.clear();
        // VPID 0000H is no operand of the others; free slots are not taken for it.
        vpids.invalidate(&mut host, InvVpid::Single(0)).unwrap();
        vpids.invalidate(&mut host, InvVpid::Address(0, Gva::new(0))).unwrap();
        assert!(host.invvpids.is_empty());
    }

    #[test]
    fn without_vpid_every_transition_and_switch_flushes() {
        let (mut vpids, mut host) = (Vpids::new(), TestHost::new(0));
        for _ in 0..2 {
            host.invvpids.clear();
            assert_eq!(vpids.enter(&mut host, None), Ok(WITHOUT_VPID));
            vpids.switched(&mut host, false).unwrap();
            vpids.leave(&mut host, false).unwrap();
            let flushes = [WITHOUT_VPID, WITHOUT_VPID, VPID01].map(InvVpid::Single);
            assert_eq!(host.invvpids, flushes);
        }
        host.invvpids.clear();
        vpids.switched(&mut host, true).unwrap();
        vpids.leave(&mut host, true).unwrap();
        assert!(host.invvpids.is_empty());
        assert_eq!(vpids.flushes, 6);
    }
}
