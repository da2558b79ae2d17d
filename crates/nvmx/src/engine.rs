//! What does a virtual machine whose guest is a hypervisor consist of, and who handles which exit?
//!
//! [`Nested`] is what all processors of L1 share, [`Processor`] what is one processor's own. The
//! host hands over L1's exits for VMX instructions ([`Nested::l1_exit`]) and all exits of L2
//! ([`Nested::l2_exit`]); afterwards the VMCS to enter is current, L1's or L2's as
//! [`Processor::runs_l2`] says. Before *every* VM entry, after all else, the host looks whether the
//! processor [is behind](Processor::is_behind), and has it [catch up](Nested::catch_up) if so.

use crate::cache::{VmcsCache, VmcsId};
use crate::caps::Caps;
use crate::ept::{RootHint, Shadow, ShadowCounters, WalkRules};
use crate::host::{Host, HostResult};
use crate::msr_bitmap::MsrBitmap;
use crate::paging::AddressSizes;
use crate::shootdown::{Place, Request, Shootdown};
use crate::tlb::Vpids;
use crate::tracking::Tracked;
use crate::vmcs12::{FieldSet, Vmcs12};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use vmx_defs::controls::{EPTP_LIST_LEN, PinCtls};
use vmx_defs::ept::Eptp;
use vmx_defs::field::Kind;
use vmx_defs::{Field, Hpa, L1Gpa};

/// What VMFUNC leaf 0 of L2 does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum VmfuncMode {
    /// Exits to L0, which changes to the cached root.
    #[default]
    Emulated,
    /// Exits to L0, which throws every root away and builds the new one, as hypervisors without a
    /// root cache do. To measure against.
    Reload,
}

/// What the host decides for a virtual machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// What L1 is offered.
    pub caps: Caps,
    /// What CPUID tells L1 about addresses.
    pub sizes: AddressSizes,
    /// First frame of the pool of shadow tables: host memory that no guest reaches.
    pub frames: Hpa,
    /// Number of frames in the pool, 16 or more, and more than twice the number of processors. L2 goes
    /// on only if the tables fit that one of its instructions needs at once: up to three for each
    /// step of each of its page walks, some 200 where L1 scatters them over its whole address space.
    /// With fewer frames than that, such a guest exits again and again.
    pub frame_count: u32,
    /// Greatest number of shadow roots, more than the number of processors.
    pub roots: u32,
    /// Number of L1's processors.
    pub processors: usize,
    /// VMCSs of L1 that are kept out of L1's memory at once, more than the number of processors.
    pub vmcs_cache: usize,
    /// What VMFUNC does.
    pub vmfunc: VmfuncMode,
    /// EPT01, which L2 runs on where L1 gives it no EPT.
    pub ept01: Eptp,
    /// Longest time that L2 runs without an exit, in units of the VMX-preemption timer. With several
    /// processors, so that none waits for ever until another, whose L2 never exits, has
    /// [flushed](crate::shootdown). Needs the timer to be offered to L1.
    pub stint: Option<u32>,
}

/// What the processors of a virtual machine share.
#[derive(Debug)]
pub struct Nested {
    pub(crate) config: Config,
    pub(crate) vmcss: VmcsCache,
    pub(crate) shadow: Shadow,
    /// Guest-state fields that are copied between vmcs12 and vmcs02 as they are.
    pub(crate) plain_guest: Vec<Field>,
    /// Control fields that are copied from vmcs12 to vmcs02 as they are.
    pub(crate) plain_controls: FieldSet,
    /// The same as `plain_guest`, as a set.
    pub(crate) plain_set: FieldSet,
    /// The last name given to a vmcs02 ([`Processor::merged`]).
    pub(crate) last_merged: u64,
    /// The pages of L1 whose writes L0 wants to see.
    pub(crate) tracked: Arc<Tracked>,
    /// For each processor, the virtual-APIC page of the VMCS that L2 runs with, while it does.
    pub(crate) virtual_apics: Vec<Option<L1Gpa>>,
    /// Changes of EPT01 so far.
    pub(crate) ept01_changes: u64,
}

/// The current VMCS of an L1 processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Current {
    pub(crate) region: L1Gpa,
    pub(crate) id: VmcsId,
}

/// Counts of one processor, for the counters of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProcessorCounters {
    /// VM entries of L1 that succeeded.
    pub entries: u64,
    /// Exits of L2 that L1 got.
    pub reflected: u64,
    /// EPTP switches by emulated VMFUNC.
    pub switches: u64,
}

/// One processor of L1.
#[derive(Debug)]
pub struct Processor {
    pub(crate) number: usize,
    shootdown: Arc<Shootdown>,
    /// The last request that it has flushed for, as in `shootdown`.
    flushed_for: Request,
    pub(crate) vmcs01: Hpa,
    pub(crate) vmcs02: Hpa,
    /// The VMXON region, while L1 is in VMX operation.
    pub(crate) vmxon: Option<L1Gpa>,
    pub(crate) current: Option<Current>,
    pub(crate) running: bool,
    pub(crate) launched: bool,
    /// Whether `values` holds what vmcs02 does.
    pub(crate) known: bool,
    /// Names what vmcs02 was last made of, and what was checked then: [`Vmcs12::merged`] of the
    /// VMCS that it still is.
    pub(crate) merged: u64,
    /// IA32_EFER.LMA of L1 at the last check of a host-state area.
    pub(crate) checked_lma: bool,
    /// The values last written to vmcs02's controls and switched state, so that only what differs is
    /// written.
    pub(crate) values: Box<Vmcs12>,
    /// [`Nested::ept01_changes`] when vmcs02 last got the real addresses of L1's pages.
    pub(crate) ept01_seen: u64,
    /// What is left of L1's preemption timer beyond what the processor counts down now.
    pub(crate) timer_rest: u64,
    pub(crate) bitmap: MsrBitmap,
    /// A frame that stands for a page which L0 hides, where the processor may write to it.
    pub(crate) scratch: Hpa,
    pub(crate) vpids: Vpids,
    /// Where the root of the last VM entry was found, and that of each entry of the EPTP list.
    pub(crate) entry_hint: RootHint,
    pub(crate) list_hints: Box<[RootHint; EPTP_LIST_LEN as usize]>,
    pub(crate) counters: ProcessorCounters,
}

/// What the host has to do after an exit, besides entering the VMCS that is current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Handled {
    /// Nothing, but to [catch up](Nested::catch_up) as before every entry.
    Enter,
    /// L2 wrote, or its page walk counts as a write, to this address of L1 in a page that
    /// [is tracked](Nested::track). Nothing has been done: the VMCS of L2 is current, at the
    /// instruction. The host either lets the write through ([`Tracked::about_to_write`], then
    /// [`Nested::untrack`]) and has L2 try again ([`crate::inject::retry`]), or carries out the
    /// instruction.
    TrackedWrite(L1Gpa),
    /// The exit is not one that the engine knows: the host handles it as for any guest.
    NotMine,
    /// The L1 processor is in shutdown after a VMX abort or a triple fault: it waits for INIT. The
    /// VMCS of L1 is current.
    Shutdown,
}

/// Host-state fields that the processor loads at every exit, of L1 and of L2 alike.
const HOST_FIELDS: [Field; 22] = [
    Field::HOST_ES_SELECTOR,
    Field::HOST_CS_SELECTOR,
    Field::HOST_SS_SELECTOR,
    Field::HOST_DS_SELECTOR,
    Field::HOST_FS_SELECTOR,
    Field::HOST_GS_SELECTOR,
    Field::HOST_TR_SELECTOR,
    Field::HOST_PAT,
    Field::HOST_EFER,
    Field::HOST_SYSENTER_CS,
    Field::HOST_CR0,
    Field::HOST_CR3,
    Field::HOST_CR4,
    Field::HOST_FS_BASE,
    Field::HOST_GS_BASE,
    Field::HOST_TR_BASE,
    Field::HOST_GDTR_BASE,
    Field::HOST_IDTR_BASE,
    Field::HOST_SYSENTER_ESP,
    Field::HOST_SYSENTER_EIP,
    Field::HOST_RSP,
    Field::HOST_RIP,
];

/// Fields of vmcs02 that are written only where a control has use for them.
const WRITTEN_IN_USE: [Field; 5] = [
    Field::IO_BITMAP_A,
    Field::IO_BITMAP_B,
    Field::VIRTUAL_APIC_ADDR,
    Field::APIC_ACCESS_ADDR,
    Field::PREEMPTION_TIMER,
];

impl Nested {
    /// A virtual machine. Allocates all that it will ever need.
    pub fn new(config: Config) -> Self {
        let rules =
            WalkRules { caps: config.caps.ept_vpid, physical_width: config.caps.physical_width };
        let shadow =
            Shadow::new(rules, config.frames, config.frame_count, config.roots, config.processors);
        let offered = |field| config.caps.supports(field);
        let plain_set = FieldSet::of(|field| offered(field) && is_plain_guest(field));
        let plain_guest = plain_set.of_kind(Kind::Guest).collect();
        let plain_controls = FieldSet::of(|field| offered(field) && is_plain_control(field));
        let vmcss = VmcsCache::new(config.vmcs_cache);
        let virtual_apics = alloc::vec![None; config.processors];
        Self {
            config,
            vmcss,
            shadow,
            plain_guest,
            plain_set,
            plain_controls,
            last_merged: 0,
            tracked: Arc::new(Tracked::new()),
            virtual_apics,
            ept01_changes: 0,
        }
    }

    /// A processor of the machine, with its number below [`Config::processors`]. `vmcs01` is
    /// current, with its host state complete; `vmcs02` has been cleared; `bitmap` and `scratch` are
    /// frames for the processor alone. Afterwards `vmcs01` is current again, and the processor is
    /// taken to run L1, until the host says in [`Self::shootdown`] that it does not.
    ///
    /// # Errors
    /// Those of the VMX instructions.
    pub fn processor(
        &self,
        host: &mut impl Host,
        number: usize,
        vmcs01: Hpa,
        vmcs02: Hpa,
        bitmap: Hpa,
        scratch: Hpa,
    ) -> HostResult<Processor> {
        let mut state = [0; HOST_FIELDS.len()];
        for (value, field) in state.iter_mut().zip(HOST_FIELDS) {
            *value = host.vmread(field)?;
        }
        host.vmptrld(vmcs02)?;
        for (value, field) in state.into_iter().zip(HOST_FIELDS) {
            host.vmwrite(field, value)?;
        }
        let bitmap = MsrBitmap::new(host, bitmap);
        host.vmwrite(Field::MSR_BITMAP, bitmap.page().as_u64())?;
        host.vmwrite(Field::VMCS_LINK_POINTER, u64::MAX)?;
        for field in
            [Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_COUNT]
        {
            host.vmwrite(field, 0)?;
        }
        if self.config.caps.supports(Field::VM_FUNCTION_CONTROLS) {
            // No function is the processor's to carry out: each exits.
            host.vmwrite(Field::VM_FUNCTION_CONTROLS, 0)?;
        }
        // VMCLEAR gives fields no value, and an entry writes these only where they are in use, if
        // they differ from 0 then.
        for field in WRITTEN_IN_USE {
            if self.config.caps.supports(field) {
                host.vmwrite(field, 0)?;
            }
        }
        host.vmptrld(vmcs01)?;
        let shootdown = self.shadow.shootdown().clone();
        shootdown.go(number, Place::Ept01);
        Ok(Processor {
            number,
            shootdown,
            flushed_for: Request::default(),
            vmcs01,
            vmcs02,
            vmxon: None,
            current: None,
            running: false,
            launched: false,
            known: false,
            merged: 0,
            checked_lma: false,
            values: Box::default(),
            ept01_seen: 0,
            timer_rest: 0,
            bitmap,
            scratch,
            vpids: Vpids::new(),
            entry_hint: RootHint::default(),
            list_hints: Box::new([RootHint::default(); EPTP_LIST_LEN as usize]),
            counters: ProcessorCounters::default(),
        })
    }

    /// What says which processors have flushed since what. The host keeps it where it can look at it
    /// without a lock.
    pub fn shootdown(&self) -> &Arc<Shootdown> {
        self.shadow.shootdown()
    }

    /// Brings a processor up to date that [is behind](Processor::is_behind): to be called before
    /// each VM entry where it is, with the VMCS current that is to be entered. For what may still
    /// come between this look and the entry see [`crate::shootdown`].
    ///
    /// # Errors
    /// [`HostError`](crate::HostError): a bug of the engine or its host; the machine can't go on.
    #[cold]
    pub fn catch_up(&mut self, processor: &mut Processor, host: &mut impl Host) -> HostResult {
        if processor.running && processor.ept01_seen != self.ept01_changes {
            self.translate_pages(processor, host)?;
        }
        processor.flushed_for = self.shadow.flush_if_behind(host, processor.number)?;
        Ok(())
    }

    /// The longest time that L2 may run, where there is one.
    pub(crate) fn stint(&self) -> Option<u32> {
        self.config.stint.filter(|_| self.config.caps.may_pin(PinCtls::PREEMPTION_TIMER))
    }

    /// What L1 is offered.
    pub fn caps(&self) -> &Caps {
        &self.config.caps
    }

    /// What the shadow MMU did.
    pub fn shadow_counters(&self) -> ShadowCounters {
        self.shadow.counters()
    }

    /// Number of shadow tables and of roots in use.
    pub fn shadow_usage(&self) -> (usize, usize) {
        self.shadow.usage()
    }

    /// The vmcs12 that is current on a processor.
    pub(crate) fn vmcs12(&self, processor: &Processor) -> Option<&Vmcs12> {
        self.vmcss.get(processor.current?.id)
    }

    /// INIT or a reset of the virtual machine reaches a processor that is not in L2: it leaves VMX
    /// operation. Its current VMCS stays in the cache, and so keeps its data.
    pub fn reset_processor(&mut self, processor: &mut Processor) {
        self.drop_current(processor);
        processor.vmxon = None;
    }

    /// The processor has no current VMCS any more.
    pub(crate) fn drop_current(&mut self, processor: &mut Processor) {
        if let Some(current) = processor.current.take() {
            self.vmcss.release(current.id);
        }
    }
}

impl Processor {
    /// Whether the VMCS of L2 is current and to be entered, rather than that of L1.
    #[inline]
    pub fn runs_l2(&self) -> bool {
        self.running
    }

    /// Whether the VMCS that is current has to be entered by VMLAUNCH, where that is the one of L2.
    #[inline]
    pub fn needs_launch(&self) -> bool {
        !self.launched
    }

    /// Whether it has to [catch up](Nested::catch_up) before it enters a guest. Needs no lock.
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.shootdown.last() != self.flushed_for
    }

    /// The guest has exited for a reason of the host's own, an interrupt of its own, say, and the
    /// exit is not handed to the engine. The host goes on as after any other exit.
    #[inline]
    pub fn exited_to_host(&mut self) {
        self.launched |= self.running;
    }

    /// Whether L1 is in VMX operation on this processor.
    #[inline]
    pub fn in_vmx_operation(&self) -> bool {
        self.vmxon.is_some()
    }

    /// What was counted.
    pub fn counters(&self) -> ProcessorCounters {
        self.counters
    }

    /// INVVPID instructions executed for L1's VPID rules.
    pub fn vpid_flushes(&self) -> u64 {
        self.vpids.flushes
    }
}

/// Guest-state fields that VM entry and exit copy without a condition.
fn is_plain_guest(field: Field) -> bool {
    field.kind() == Kind::Guest
        && !matches!(
            field,
            // L0's own: no shadow VMCS is offered.
            Field::VMCS_LINK_POINTER
            // Loaded and saved as controls say.
            | Field::GUEST_DEBUGCTL
            | Field::GUEST_DR7
            | Field::GUEST_PAT
            | Field::GUEST_EFER
            | Field::PREEMPTION_TIMER
            // In use with PAE paging and EPT only.
            | Field::GUEST_PDPTE0
            | Field::GUEST_PDPTE1
            | Field::GUEST_PDPTE2
            | Field::GUEST_PDPTE3
        )
}

/// Control fields that L2 runs with as L1 wrote them.
fn is_plain_control(field: Field) -> bool {
    matches!(
        field,
        Field::TSC_OFFSET
            | Field::TSC_MULTIPLIER
            | Field::XSS_EXITING_BITMAP
            | Field::EXCEPTION_BITMAP
            | Field::PF_ERROR_MASK
            | Field::PF_ERROR_MATCH
            | Field::CR3_TARGET_COUNT
            | Field::CR3_TARGET0
            | Field::CR3_TARGET1
            | Field::CR3_TARGET2
            | Field::CR3_TARGET3
            | Field::CR0_MASK
            | Field::CR4_MASK
            | Field::CR0_SHADOW
            | Field::CR4_SHADOW
            | Field::TPR_THRESHOLD
            | Field::PLE_GAP
            | Field::PLE_WINDOW
    )
}

#[cfg(test)]
mod tests;
