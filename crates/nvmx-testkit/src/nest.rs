//! How does L0 run L1 and its guest on a machine of the model?
//!
//! As the hypervisor does: every exit goes to L0, which keeps L1's few own ones to itself, hands the
//! rest to the engine, and enters again at once whichever VMCS is current then. Between two
//! operations each processor is in the guest that L1 believes to run there, so that it may hold on
//! to whatever a running processor may.

use std::ops::Range;
use std::sync::Arc;

use nvmx::engine::Processor as EngineProcessor;
use nvmx::host::{HostResult, L1Mapping, L1Memory, Msrs, Vmx};
use nvmx::inject::{self, Exception, Fault};
use nvmx::paging::AddressSizes;
use nvmx::{Config, Gprs, Handled, Nested, Tracked, caps::Caps};
use vmx_defs::ept::EptViolation;
use vmx_defs::event::{IntrInfo, activity, vector};
use vmx_defs::{EptPermissions, Eptp, ExitReason, Field, Hpa, L1Gpa};
use vmx_model::registers::{gpr, rflags};
use vmx_model::retention::Rng;
use vmx_model::{Machine, ModelCaps, Operation, Outcome, Platform, Retention, VmxMode, layout};

use crate::caps;
use crate::config::NestConfig;
use crate::ept01::Ept01;
use crate::frames::{self, Use};
use crate::host::Host;
use crate::vmcs01;
use crate::watch::{Tamper, Watch};

/// Exits that one operation may take. Each is of a level of a walk, a byte or a table at most.
const EXITS: u64 = 2_000;

/// After so many, L0 makes the other processors exit: they may hold what this one waits for.
const PATIENCE: u64 = 16;

/// What L1 was offered.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) caps: Caps,
}

/// A machine with L0 and the engine on it: L1's platform.
#[derive(Debug)]
pub struct Nest {
    machine: Machine,
    nested: Nested,
    processors: Vec<Vcpu>,
    ept01: Ept01,
    offer: Offer,
    exits: u64,
    pub(crate) watch: Watch,
    /// Frames that L1 has none of.
    pub(crate) spare: Vec<Hpa>,
    /// When L0 interrupts processors.
    kicks: Option<(u64, Rng)>,
    /// When L0 does something to L1's memory.
    moves: Option<(u64, Rng)>,
    pub(crate) tracked: Arc<Tracked>,
    /// The page that is tracked, and what was in it then.
    pub(crate) snapshot: Option<(L1Gpa, Vec<u64>)>,
}

/// What L0 keeps of a processor of L1.
#[derive(Debug)]
struct Vcpu {
    engine: EngineProcessor,
    launched: bool,
    /// It is in shutdown.
    dead: bool,
}

/// What an exit has come to.
enum Next {
    /// L1 goes on behind the instruction that exited.
    Following,
    /// L1 goes on where its state says.
    Same,
    /// L1 gets a fault.
    Fault(Fault),
    /// The engine has seen to it.
    Engine(Handled),
}

/// What has been seen while an operation went on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Progress {
    /// Nothing yet: the operation is to be executed, or executed again.
    #[default]
    None,
    /// L0 has completed the instruction.
    Completed,
    /// An event is on its way to the guest.
    Delivering,
    /// L1's VM entry has succeeded.
    Entering,
}

impl Nest {
    /// A machine whose processors begin with L1's registers, all memory of L1 zero.
    ///
    /// # Panics
    /// If the configuration is not one that the engine takes.
    pub fn new(config: &NestConfig, retention: Retention, processors: usize) -> Self {
        let hardware = &config.hardware;
        let offer = Offer { caps: caps::offered(hardware) };
        let registers = (0..processors).map(layout::l1_registers);
        let mut machine = Machine::new(hardware, retention, frames::PAGES, registers);
        for offset in (0..0x1000).step_by(8) {
            machine.memory.write_u64(Hpa::new(frames::ONES.as_u64() + offset), u64::MAX);
        }
        let ept01 = Ept01::new(&mut machine.memory, config, offer.caps.physical_width);
        let sizes =
            AddressSizes { physical_width: offer.caps.physical_width, gigabyte_pages: true };
        let nested = Nested::new(Config {
            caps: offer.caps.clone(),
            sizes,
            frames: frames::POOL,
            frame_count: config.frames,
            roots: config.roots + processors as u32,
            processors,
            vmcs_cache: config.vmcs_cache + processors,
            vmfunc: config.vmfunc,
            ept01: ept01.eptp(),
            stint: None,
        });
        let watch = Watch::new(config.frames, processors);
        let kicks = config.kicks.map(|(odds, seed)| (odds, Rng::new(seed)));
        let moves = config.moves.map(|(odds, seed)| (odds, Rng::new(seed)));
        let tracked = Arc::clone(nested.tracked());
        let mut nest = Self {
            machine,
            nested,
            processors: Vec::new(),
            ept01,
            offer,
            exits: 0,
            watch,
            kicks,
            moves,
            tracked,
            snapshot: None,
            spare: frames::spare(),
        };
        nest.host(0).fill_msr_bitmap();
        for processor in 0..processors {
            if let Err(error) = nest.start(hardware, processor) {
                panic!("processor {processor} can't be set up: {error:?}");
            }
        }
        nest
    }

    pub(crate) fn host(&mut self, processor: usize) -> Host<'_> {
        let Self { machine, ept01, tracked, offer, watch, .. } = self;
        Host { machine, ept01, tracked, offer, processor, watch }
    }

    /// Brings a processor into VMX operation and L1 onto it.
    fn start(&mut self, hardware: &ModelCaps, processor: usize) -> HostResult {
        let own = |what| frames::own(processor, what);
        let l1 = self.machine.processors[processor].regs.clone();
        for region in [Use::Vmxon, Use::Vmcs01, Use::Vmcs02] {
            self.machine.memory.write_u32(own(region), hardware.basic.revision());
        }
        self.machine.processors[processor].enter_root(own(Use::Vmxon));
        let eptp = self.ept01.eptp();
        let mut host = self.host(processor);
        for region in [Use::Vmcs01, Use::Vmcs02] {
            if let Err(failure) = host.root().vmclear(own(region)) {
                panic!("VMCLEAR of a fresh region: {failure:?}");
            }
        }
        host.vmptrld(own(Use::Vmcs01))?;
        for (field, value) in vmcs01::fields(hardware, &l1, eptp) {
            host.vmwrite(field, value)?;
        }
        host.set_masks(false)?;
        let Self { machine, ept01, tracked, offer, nested, watch, .. } = self;
        let engine = nested.processor(
            &mut Host { machine, ept01, tracked, offer, processor, watch },
            processor,
            own(Use::Vmcs01),
            own(Use::Vmcs02),
            own(Use::MsrBitmap02),
            own(Use::Scratch),
        )?;
        self.processors.push(Vcpu { engine, launched: false, dead: false });
        match self.enter(processor) {
            Outcome::Entered(None) => Ok(()),
            other => panic!("the first entry of L1: {other:?}"),
        }
    }

    /// The machine below.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine below, for a test that tampers with it.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Where an address of L1 leads.
    pub fn translate(&self, at: L1Gpa) -> L1Mapping {
        self.ept01.translate(&self.machine.memory, at)
    }

    /// Whether this is the EPTP that L2 runs with where L1 gives it no EPT.
    pub fn is_ept01(&self, eptp: Eptp) -> bool {
        eptp == self.ept01.eptp()
    }

    /// Whether a page of the machine is one that a guest may have: L1's, one where nothing is, or the
    /// page of ones, unless it could be written.
    pub fn is_guests(&self, page: u64, writable: bool) -> bool {
        let page = Hpa::new(page);
        frames::is_l1(page) || page == frames::ONES && !writable
    }

    /// The engine's part that all processors share.
    pub fn engine(&self) -> &Nested {
        &self.nested
    }

    /// The engine's part of a processor.
    pub fn engine_processor(&self, processor: usize) -> &EngineProcessor {
        &self.processors[processor].engine
    }

    /// Has somebody else write to L1's memory while the engine reads it.
    pub fn set_tamper(&mut self, tamper: Option<Tamper>) {
        self.watch.set_tamper(tamper);
    }

    /// The greatest number of calls to its host that the engine has made for one exit.
    pub fn most_calls(&self) -> u64 {
        self.watch.most_calls()
    }

    /// Number of exits to L0 so far.
    pub fn exits(&self) -> u64 {
        self.exits
    }

    fn field(&mut self, processor: usize, field: Field) -> u64 {
        match self.host(processor).vmread(field) {
            Ok(value) => value,
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Enters what is to run now. What comes back is as the program would see it, or an exit.
    fn enter(&mut self, processor: usize) -> Outcome {
        if self.processors[processor].engine.is_behind() {
            let Self { machine, ept01, tracked, offer, nested, processors, watch, .. } = self;
            let mut host = Host { machine, ept01, tracked, offer, processor, watch };
            if let Err(error) = nested.catch_up(&mut processors[processor].engine, &mut host) {
                panic!("{error:?}");
            }
        }
        let vcpu = &mut self.processors[processor];
        let l2 = vcpu.engine.runs_l2();
        let launch = if l2 { vcpu.engine.needs_launch() } else { !vcpu.launched };
        if !l2 {
            vcpu.launched = true;
        } else if let Some(vmcs) = self.machine.processors[processor].vmcs() {
            self.watch.before_l2(processor, vmcs);
        }
        let mut root = self.machine.processors[processor].root(&mut self.machine.memory);
        let entered = if launch { root.vmlaunch() } else { root.vmresume() };
        match entered {
            Ok(Outcome::Exit(reason)) if reason.is_entry_failure() => {
                panic!("L{} can't be entered: {reason:?}", 1 + u8::from(l2))
            }
            Ok(outcome) => outcome,
            Err(failure) => panic!("L{} can't be entered: {failure:?}", 1 + u8::from(l2)),
        }
    }

    /// Handles an exit, of L1 or of L2. Whether the processor of L1 still runs.
    fn handle(&mut self, processor: usize, reason: ExitReason) -> HostResult<bool> {
        self.exits += 1;
        self.watch.exit();
        let registers = &mut self.machine.processors[processor].regs;
        let mut gprs = Gprs { values: registers.gprs };
        let next = self.answer(processor, &mut gprs, reason)?;
        let runs = match next {
            Next::Following => inject::advance_rip(&mut self.host(processor)).map(|()| true),
            Next::Same | Next::Engine(Handled::Enter) => Ok(true),
            Next::Fault(fault) => inject::deliver(&mut self.host(processor), fault).map(|()| true),
            Next::Engine(Handled::Shutdown) => Ok(false),
            Next::Engine(Handled::NotMine) => panic!("{reason:?} of L1 was not asked for"),
            Next::Engine(Handled::TrackedWrite(at)) => {
                self.let_write(processor, at)?;
                Ok(true)
            }
        };
        let registers = &mut self.machine.processors[processor].regs;
        gprs.values[gpr::RSP] = registers.gprs[gpr::RSP];
        registers.gprs = gprs.values;
        runs
    }

    fn answer(
        &mut self,
        processor: usize,
        gprs: &mut Gprs,
        reason: ExitReason,
    ) -> HostResult<Next> {
        let Self { machine, ept01, tracked, offer, nested, processors, watch, .. } = self;
        let mut host = Host { machine, ept01, tracked, offer, processor, watch };
        let vcpu = &mut processors[processor];
        if vcpu.engine.runs_l2() {
            return nested.l2_exit(&mut vcpu.engine, &mut host, gprs, reason).map(Next::Engine);
        }
        let was_vmx = vcpu.engine.in_vmx_operation();
        match reason.basic() {
            ExitReason::CPUID => {
                let answer = host.machine.processors[processor].cpuid(gprs.values[gpr::RAX] as u32);
                for (number, value) in
                    [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].into_iter().zip(answer)
                {
                    gprs.values[number] = value.into();
                }
                Ok(Next::Following)
            }
            ExitReason::RDMSR => Ok(match host.read_msr(gprs.values[gpr::RCX] as u32) {
                Ok(value) => {
                    gprs.values[gpr::RAX] = value & 0xffff_ffff;
                    gprs.values[gpr::RDX] = value >> 32;
                    Next::Following
                }
                Err(_) => Next::Fault(Fault::Gp(0)),
            }),
            ExitReason::WRMSR => {
                let low = |number: usize| gprs.values[number] & 0xffff_ffff;
                let value = low(gpr::RDX) << 32 | low(gpr::RAX);
                Ok(match host.write_msr(low(gpr::RCX) as u32, value) {
                    Ok(()) => Next::Following,
                    Err(_) => Next::Fault(Fault::Gp(0)),
                })
            }
            ExitReason::CR_ACCESS => Ok(match host.control_register(gprs, was_vmx)? {
                Ok(()) => Next::Following,
                Err(fault) => Next::Fault(fault),
            }),
            // Of XCR0 there is one value; INVD is done as WBINVD, which has nothing to do.
            ExitReason::XSETBV | ExitReason::INVD => Ok(Next::Following),
            ExitReason::EPT_VIOLATION => {
                let at = L1Gpa::new(host.vmread(Field::GUEST_PHYSICAL_ADDRESS)?);
                if host.tracked.contains(at) {
                    return Ok(Next::Engine(Handled::TrackedWrite(at)));
                }
                if host.translate(at).permissions.contains(EptPermissions::WRITE) {
                    // A stale translation denied it.
                    let told = EptViolation::from(host.vmread(Field::EXIT_QUALIFICATION)?);
                    inject::retry(&mut host, told.nmi_unblocking())?;
                    return Ok(Next::Same);
                }
                // What L0 hides can be read; all else is #GP.
                let vectoring = IntrInfo::from(host.vmread(Field::IDT_VECTORING_INFO)? as u32);
                match inject::raise(&mut host, vectoring, Exception::new(vector::GP))? {
                    inject::Outcome::Exception(_) => Ok(Next::Same),
                    inject::Outcome::TripleFault => {
                        host.vmwrite(Field::GUEST_ACTIVITY, activity::SHUTDOWN.into())?;
                        Ok(Next::Engine(Handled::Shutdown))
                    }
                }
            }
            ExitReason::TRIPLE_FAULT => {
                host.vmwrite(Field::GUEST_ACTIVITY, activity::SHUTDOWN.into())?;
                Ok(Next::Engine(Handled::Shutdown))
            }
            _ => {
                let handled = nested.l1_exit(&mut vcpu.engine, &mut host, gprs, reason)?;
                let is_vmx = vcpu.engine.in_vmx_operation();
                if was_vmx != is_vmx {
                    host.set_masks(is_vmx)?;
                }
                Ok(Next::Engine(handled))
            }
        }
    }

    /// The exit reason that L1, which runs, would read, without L1 noticing.
    fn reason_for_l1(&mut self, processor: usize) -> ExitReason {
        let gprs = self.machine.processors[processor].regs.gprs;
        let encoding = Field::EXIT_REASON.encoding().into();
        let read = Operation::Vmread { encoding };
        let Machine { memory, processors } = &mut self.machine;
        let outcome = processors[processor].execute(memory, &read);
        let Outcome::Exit(reason) = outcome else { panic!("VMREAD of L1: {outcome:?}") };
        let state = [Field::GUEST_RIP, Field::GUEST_RFLAGS];
        let before = state.map(|field| (field, self.field(processor, field)));
        let handled = self.handle(processor, reason);
        assert_eq!(handled, Ok(true), "VMREAD of L1");
        let value = self.machine.processors[processor].regs.gprs[gpr::RAX];
        self.machine.processors[processor].regs.gprs = gprs;
        for (field, value) in before {
            if let Err(error) = self.host(processor).vmwrite(field, value) {
                panic!("{error:?}");
            }
        }
        match self.enter(processor) {
            Outcome::Entered(None) => ExitReason::from_bits(value as u32),
            other => panic!("L1 after VMREAD: {other:?}"),
        }
    }
}

impl Platform for Nest {
    fn execute(&mut self, number: usize, operation: &Operation) -> Outcome {
        if self.processors[number].dead {
            return Outcome::Stopped;
        }
        self.kick_some();
        if self.moves.as_mut().is_some_and(|(odds, rng)| rng.one_in(*odds)) {
            self.disturb_memory();
        }
        let mut progress = Progress::None;
        let first = self.exits;
        while self.exits - first < EXITS {
            let in_guest = self.machine.processors[number].mode() == VmxMode::NonRoot;
            assert!(in_guest, "L0 has not entered");
            let Machine { memory, processors } = &mut self.machine;
            let mut outcome = processors[number].execute(memory, operation);
            // As long as there is something to do for L0.
            while let Outcome::Exit(reason) = outcome
                && self.exits - first < EXITS
            {
                if (self.exits - first) % PATIENCE == PATIENCE - 1 {
                    self.kick_others(number);
                }
                outcome = match self.exited(number, operation, reason, &mut progress) {
                    Ok(outcome) => outcome,
                    Err(seen) => return seen,
                };
            }
            // An event that the processor delivers on entry is what the program sees.
            match (progress, outcome) {
                (Progress::Entering, Outcome::Entered(event)) => return Outcome::Entered(event),
                (_, Outcome::Entered(Some(event))) => return Outcome::Delivered(event),
                (Progress::Completed, Outcome::Entered(None)) => {
                    return self.completed(number, operation);
                }
                (_, Outcome::Entered(None)) => {}
                (_, seen) => return seen,
            }
        }
        panic!("no progress: {operation:?}");
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        let at = self.ept01.translate(&self.machine.memory, at).hpa;
        self.machine.memory.read_u64(at)
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        if let Some(to) = self.host(0).to_write(at, 8) {
            self.machine.memory.write_u64(to, value);
        }
    }
}

impl Nest {
    /// A processor exits to L0, which has nothing to do but what is due at each exit.
    pub(crate) fn kick(&mut self, number: usize) {
        self.stop(number);
        self.go_on(number);
    }

    /// A processor exits for a reason of L0's own.
    fn stop(&mut self, number: usize) {
        let Machine { memory, processors } = &mut self.machine;
        processors[number].exit_to_hypervisor(memory);
        self.processors[number].engine.exited_to_host();
        self.exits += 1;
        self.watch.exit();
    }

    /// A processor that L0 has stopped goes on.
    fn go_on(&mut self, number: usize) {
        let entered = self.enter(number);
        assert_eq!(entered, Outcome::Entered(None), "L0 enters what it has interrupted");
    }

    /// Does something while no processor runs.
    pub(crate) fn with_all_stopped(&mut self, body: impl FnOnce(&mut Self)) {
        self.with_stopped(0..self.processors.len(), body);
    }

    /// Does something while these processors are in L0.
    pub(crate) fn with_stopped<T>(
        &mut self,
        processors: Range<usize>,
        body: impl FnOnce(&mut Self) -> T,
    ) -> T {
        processors.clone().for_each(|number| self.stop(number));
        let result = body(self);
        processors.for_each(|number| self.go_on(number));
        result
    }

    /// The engine's part that all processors share, and the host of one of them.
    pub(crate) fn engine_and_host(&mut self, processor: usize) -> (&mut Nested, Host<'_>) {
        let Self { machine, ept01, tracked, offer, nested, watch, .. } = self;
        (nested, Host { machine, ept01, tracked, offer, processor, watch })
    }

    /// A number that L0 draws for what it does to L1's memory.
    pub(crate) fn draw(&mut self, bound: u64) -> u64 {
        self.moves.as_mut().map_or(0, |(_, rng)| rng.below(bound))
    }

    fn kick_others(&mut self, number: usize) {
        for other in (0..self.processors.len()).filter(|other| *other != number) {
            self.kick(other);
        }
    }

    /// L0's own interrupts.
    fn kick_some(&mut self) {
        for number in 0..self.processors.len() {
            if self.kicks.as_mut().is_some_and(|(odds, rng)| rng.one_in(*odds)) {
                self.kick(number);
            }
        }
    }

    /// Handles an exit that an operation, or the entry after an earlier one, has led to, and enters
    /// again. `Err` is what the program sees in the end.
    fn exited(
        &mut self,
        number: usize,
        operation: &Operation,
        reason: ExitReason,
        progress: &mut Progress,
    ) -> Result<Outcome, Outcome> {
        let rip = self.field(number, Field::GUEST_RIP);
        let was_l2 = self.processors[number].engine.runs_l2();
        match self.handle(number, reason) {
            Ok(true) => {}
            Ok(false) => {
                self.processors[number].dead = true;
                // It is in shutdown, which is a state that is entered.
                self.enter(number);
                return Err(Outcome::Stopped);
            }
            Err(error) => panic!("{error:?} at {operation:?}, {reason:?}"),
        }
        let is_l2 = self.processors[number].engine.runs_l2();
        let now = self.field(number, Field::GUEST_RIP);
        let pending = IntrInfo::from(self.field(number, Field::ENTRY_INTR_INFO) as u32).valid();
        let entered = self.enter(number);
        let is_entry = matches!(reason, ExitReason::VMLAUNCH | ExitReason::VMRESUME);
        match (was_l2, is_l2) {
            (false, true) => *progress = Progress::Entering,
            (true, false) => return Err(Outcome::Exit(self.reason_for_l1(number))),
            // An entry that failed for its guest state loads the host state. One that has to wait for
            // another processor is executed again.
            (false, false) if is_entry && !pending && now != rip && now != rip.wrapping_add(3) => {
                return Err(Outcome::Exit(self.reason_for_l1(number)));
            }
            _ if *progress == Progress::Entering => {}
            _ if pending => *progress = Progress::Delivering,
            _ if now != rip => *progress = Progress::Completed,
            _ => {}
        }
        Ok(entered)
    }

    /// L0 has carried out an instruction in the place of the processor.
    fn completed(&mut self, number: usize, operation: &Operation) -> Outcome {
        let regs = &self.machine.processors[number].regs;
        let flags = if operation.is_vmx() { regs.rflags & (rflags::CF | rflags::ZF) } else { 0 };
        Outcome::Completed { value: operation.value(&regs.gprs), flags }
    }
}
