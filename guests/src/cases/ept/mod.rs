//! Answers: does L1's EPT allow, deny and report as it says?
//!
//! SDM Vol. 3C, "EPT-Induced VM Exits", "Exit Qualification for EPT Violations" and "Accessed and
//! Dirty Flags for EPT".

mod ad;
mod large;
mod levels;
pub mod many;
mod misconfiguration;
mod neighbours;
mod permissions;
mod random;
mod tables;
pub mod types;
mod walk;

use vmx_defs::{ExitReason, L2Gpa, msr::EptVpidCap};

use crate::{
    ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        Exit, Mode, Outcome, Vm, Vmx,
        ept::{LARGE, LEAF, Slot},
        paging::WINDOW,
        raw::VMCALL,
    },
};

/// Read, write and execute permissions of every valid combination, by access and page size.
pub const MATRIX: &[Case] = permissions::MATRIX;
/// Permissions at the upper levels, and what changes without INVEPT.
pub const PERMISSIONS: &[Case] = permissions::CASES;
/// Entries of all levels together.
pub const LEVELS: &[Case] = levels::CASES;
/// Large pages.
pub const LARGE_PAGES: &[Case] = large::CASES;
/// The entries of one table beside each other.
pub const NEIGHBOURS: &[Case] = neighbours::CASES;
/// Reserved settings.
pub const MISCONFIGURATIONS: &[Case] = misconfiguration::CASES;
/// Accessed and dirty flags.
pub const AD: &[Case] = ad::CASES;
/// More EPTs and tables than can be shadowed.
pub const MANY: &[Case] = many::CASES;
/// L2's tables on each level, and accesses that lie in two pages.
pub const TABLES: &[Case] = tables::CASES;
/// Memory types of L1's that change below L2.
pub const TYPES: &[Case] = types::CASES;
/// Tables that change at random.
pub const RANDOM: &[Case] = random::CASES;
/// Accesses to L2's paging structures.
pub const WALK: &[Case] = walk::CASES;

/// Size of the EPT page under test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    K4,
    M2,
}

/// What L2 does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}

impl Access {
    /// Its bit in the exit qualification, and in an entry's permissions.
    const fn bit(self) -> u64 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
            Self::Fetch => 4,
        }
    }
}

/// What is read at [`TARGET`], and where: not the first page nor the first word.
const VALUE: u64 = 0x0123_4567_89AB_CDEF;
const TARGET: u64 = WINDOW + 0x5008;
/// Where a VMCALL is, to be fetched.
const CODE: u64 = WINDOW + 0x5020;

/// An L2 with one EPT page under test.
struct Stage {
    vmx: Vmx,
    vm: Vm,
    /// The 4-KiB page that holds [`TARGET`].
    page: Page,
    /// The leaf entry, which allows everything at first.
    leaf: Slot,
}

impl Stage {
    fn new(ctx: &mut Ctx<'_>, size: Size) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        let vm = Vm::new(ctx, &vmx, Mode::Long)?;
        if size == Size::M2 && !vmx.caps.ept.contains(EptVpidCap::PAGE_2M) {
            skip!("no 2-MiB pages in EPT");
        }
        let gpa = L2Gpa::new(TARGET);
        let (page, leaf) = match size {
            Size::K4 => {
                let page = ctx.arena.page();
                (page, vm.map(ctx, gpa, page))
            }
            Size::M2 => {
                let block = ctx.arena.block_2m();
                let leaf = vm.ept.map(ctx.arena, gpa, 2, block.address() | LEAF | LARGE);
                (Page::at(block.address() + 0x5000), leaf)
            }
        };
        page.write(1, VALUE);
        page.put(0x20, VMCALL.bytes);
        Ok(Self { vmx, vm, page, leaf })
    }

    /// L2 does it; `Ok` if it went through, with the effect checked.
    fn access(&mut self, access: Access) -> Result<Result<(), Exit>, Stop> {
        let done = match access {
            Access::Read => match self.vm.load(TARGET) {
                Ok(value) => {
                    ensure_eq!(value, self.page.read(1), "what L2 read");
                    Ok(())
                }
                Err(outcome) => Err(outcome),
            },
            Access::Write => {
                let result = self.vm.store(TARGET, !VALUE);
                let expected = if result.is_ok() { !VALUE } else { VALUE };
                ensure_eq!(self.page.read(1), expected, "memory after L2's write");
                self.page.write(1, VALUE);
                result
            }
            Access::Fetch => self.vm.fetch(CODE),
        };
        match done {
            Ok(()) => Ok(Ok(())),
            Err(Outcome::Exit(exit)) => Ok(Err(exit)),
            Err(other) => Err(other.into()),
        }
    }

    /// L2 must do it.
    fn allowed(&mut self, access: Access) -> Verdict {
        match self.access(access)? {
            Ok(()) => Ok(()),
            Err(exit) => Err(Outcome::Exit(exit).into()),
        }
    }

    /// L2 must be denied it by an EPT violation at the address under test, whose permissions are
    /// reported as `permissions`.
    fn denied(&mut self, access: Access, permissions: u64) -> Verdict {
        let Err(exit) = self.access(access)? else {
            crate::fail!("{access:?} went through permissions {permissions:#x}");
        };
        let address = if access == Access::Fetch { CODE } else { TARGET };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason of {access:?}");
        // Bits 6 and 11:9 depend on features that may or may not be there.
        ensure_eq!(
            exit.qualification & 0x1BF,
            access.bit() | permissions << 3 | 1 << 7 | 1 << 8,
            "qualification of {access:?}"
        );
        ensure_eq!(exit.gpa, address, "guest-physical address");
        ensure_eq!(exit.gla, address, "guest-linear address");
        Ok(())
    }
}

/// What L2 can do.
const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];

/// A sequence that visits everything in no order.
struct Dice(u64);

impl Dice {
    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth's MMIX generator.
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
