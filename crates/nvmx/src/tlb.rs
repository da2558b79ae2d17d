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
