//! Answers: does EPTP switching keep the nine rules S1 to S9 that this project grew from?
//!
//! Each rule runs with VPID disabled and enabled, with accessed and dirty flags off and on, with L2
//! in 4-level and in PAE paging, and with 2, 5, 64 and 512 views. The rules are those of SDM Vol.
//! 3C, "VM Functions", "EPTP Switching" and "Operations that Invalidate Cached Mappings".

mod rules;
mod translation;

use vmx_defs::{EptPermissions, ExitReason, Field, L2Gpa, ProcCtls2, msr::EptVpidCap};

use crate::{
    ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, Mode, Outcome, Vm, Vmx, ept::LEAF, paging::WINDOW, views::Views, vmcs},
};

/// One setting that a rule is tried in.
#[derive(Clone, Copy)]
struct Setting {
    vpid: bool,
    ad: bool,
    mode: Mode,
    views: usize,
}

/// L2 with its views, running in view 0.
struct Stage {
    vmx: Vmx,
    vm: Vm,
    views: Views,
    /// Second page of the window, the same page in every view.
    other: Page,
}

/// What the second page of the window begins with.
const OTHER: u64 = 0x07E4_0000;
/// Linear and guest-physical address of the second page of the window.
const OTHER_ADDRESS: u64 = WINDOW + 0x1000;

impl Stage {
    /// Sets it up, A/D flags of view `i` as `ad(i)` says.
    fn with_flags(
        ctx: &mut Ctx<'_>,
        setting: Setting,
        ad: impl Fn(usize) -> bool,
    ) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        if !vmx.caps.eptp_switching() {
            skip!("EPTP switching not offered");
        }
        let mut vm = Vm::new(ctx, &vmx, setting.mode)?;
        let any_flags = (0..setting.views).any(&ad);
        if any_flags && !vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
            skip!("no accessed and dirty flags for EPT");
        }
        if setting.vpid {
            vm.enable_vpid(&vmx, 1)?;
        }
        let views = Views::new(ctx, &vm.ept, setting.views, ad);
        let other = ctx.arena.page();
        other.write(0, OTHER);
        for view in 0..setting.views {
            views.leaf(view).table.write(1, other.address() | LEAF);
        }
        vm.enable_eptp_switching(&vmx, views.list)?;
        vm.ept = views.ept(0);
        vmcs::write(Field::EPT_POINTER, views.eptp(0));
        Ok(Self { vmx, vm, views, other })
    }

    fn new(ctx: &mut Ctx<'_>, setting: Setting) -> Result<Self, Stop> {
        Self::with_flags(ctx, setting, |_| setting.ad)
    }

    /// L2 switches to `view`, which must succeed.
    fn switch(&mut self, view: usize) -> Result<(), Outcome> {
        self.vm.vmfunc(0, view as u64)
    }

    /// L2 must read the value of `view` in the first page of the window.
    fn expect_view(&mut self, view: usize) -> Verdict {
        ensure_eq!(self.vm.load(WINDOW)?, Views::value(view), "what L2 reads in view {view}");
        Ok(())
    }

    /// A sample of the views: all of them up to 16, else some at the ends and between.
    fn sample(&self) -> impl Iterator<Item = usize> + use<> {
        let count = self.views.count;
        (0..count)
            .filter(move |&view| count <= 16 || view < 3 || view % 37 == 0 || view + 2 >= count)
    }
}

/// The exit that a step of L2 must have led to.
fn exit_of(result: Result<(), Outcome>) -> Result<Exit, Stop> {
    match result {
        Err(outcome) => outcome.exit(),
        Ok(()) => crate::fail!("L2 went on without an exit"),
    }
}

macro_rules! setting {
    ($rule:literal, $run:path, $vpid_name:literal, $vpid:literal, $ad_name:literal, $ad:literal,
     $mode_name:literal, $mode:ident, $views:literal) => {
        Case {
            name: concat!(
                $rule, ".", $vpid_name, ".", $ad_name, ".", $mode_name, ".views_", $views
            ),
            run: |ctx| {
                let setting = Setting { vpid: $vpid, ad: $ad, mode: Mode::$mode, views: $views };
                $run(ctx, setting)
            },
        }
    };
}

macro_rules! modes {
    ($rule:literal, $run:path, $(($mode_name:literal, $mode:ident)),*) => {
        &[
            $(
                modes!(@views $rule, $run, $mode_name, $mode, 2),
                modes!(@views $rule, $run, $mode_name, $mode, 5),
                modes!(@views $rule, $run, $mode_name, $mode, 64),
                modes!(@views $rule, $run, $mode_name, $mode, 512),
            )*
        ]
    };
    (@views $rule:literal, $run:path, $mode_name:literal, $mode:ident, $views:literal) => {
        [
            setting!($rule, $run, "vpid_off", false, "ad_off", false, $mode_name, $mode, $views),
            setting!($rule, $run, "vpid_off", false, "ad_on", true, $mode_name, $mode, $views),
            setting!($rule, $run, "vpid_on", true, "ad_off", false, $mode_name, $mode, $views),
            setting!($rule, $run, "vpid_on", true, "ad_on", true, $mode_name, $mode, $views),
        ]
    };
}

macro_rules! both {
    ($name:ident, $rule:literal, $run:path) => {
        /// The rule in every setting.
        pub const $name: &[Case] =
            modes!($rule, $run, ("4level", Long), ("pae", Pae)).as_flattened();
    };
}

both!(S1, "s1", rules::switches);
both!(S2, "s2", rules::keeps_roots);
both!(S3, "s3", rules::follows_ad);
both!(S4, "s4", translation::invalidates);
both!(S6, "s6", rules::leaves_others);
both!(S7, "s7", rules::refuses);
both!(S8, "s8", rules::reports);
both!(S9, "s9", rules::reads_list);

/// The rule for PAE paging in every setting of PAE paging.
pub const S5: &[Case] = modes!("s5", translation::keeps_pdptes, ("pae", Pae)).as_flattened();

/// Cases of a rule that have no use for every setting.
pub const SINGLE: &[Case] = &[
    Case { name: "s4.vpid_off.pcid", run: translation::invalidates_all_pcids },
    Case { name: "s4.vpid_off.global", run: translation::invalidates_globals },
    Case { name: "s5.unmapped_pdpt", run: translation::pdpt_not_translated },
    Case { name: "s7.leaf.64_and_more.ud", run: rules::high_leaf },
    Case { name: "s7.leaf.1_to_63.exits", run: rules::low_leaf },
    Case { name: "s7.leaf.0.not_enabled", run: rules::leaf_0_off },
    Case { name: "s7.not_enabled.ud", run: rules::vmfunc_off },
    Case { name: "s7.cpl3", run: rules::any_cpl },
    Case { name: "s7.prefixed.length", run: rules::prefixed },
    Case { name: "s7.upper_halves_ignored", run: rules::upper_halves },
    Case { name: "s7.entry.each_bit", run: rules::each_entry_bit },
];
