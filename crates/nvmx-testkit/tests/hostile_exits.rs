//! Does the engine survive every exit, with every control that it offers in use?
//!
//! The model lacks the TPR shadow, APIC-access pages, the preemption timer and more. Here the
//! processor is paper: fields that keep what was written, and exits for any reason with any fields,
//! while L1 writes anything anywhere. The engine must answer all of it without a panic, without an
//! error of its host, within bounds; and vmcs02 names pages of L1's, or those made for it, alone.

use std::collections::BTreeMap;

use nvmx::caps::{Caps, HardwareCaps};
use nvmx::host::{Frames, HostResult, InvEpt, InvVpid, L1Mapping, L1Memory, MsrFault, Msrs, Vmx};
use nvmx::paging::AddressSizes;
use nvmx::{Config, Gprs, Handled, Nested, VmfuncMode};
use nvmx_testkit::{caps, seeds};
use vmx_defs::ept::memory_type;
use vmx_defs::field::{FIELDS, Kind, SLOTS};
use vmx_defs::{
    EptPermissions, Eptp, ExitReason, Field, Gva, Hpa, L1Gpa, ProcCtls, ProcCtls2, msr,
};
use vmx_model::retention::Rng;
use vmx_model::{ModelCaps, Operation, Outcome, Platform, Program, layout};

/// L1's RAM.
const RAM: u64 = (layout::PAGES as u64) << 12;
/// Where it is in the machine.
const PLACE: u64 = 1 << 36;
/// What stands for a page that is hidden.
const ONES: u64 = 0x5a_0000_0000;
/// A page that is hidden.
const HIDDEN: u64 = 301 << 12;
/// Frames of the engine.
const POOL: u64 = 0x100_0000;
const POOL_FRAMES: u32 = 64;
const VMCS01: Hpa = Hpa::new(0x1000);
const VMCS02: Hpa = Hpa::new(0x2000);
const BITMAP: Hpa = Hpa::new(0x3000);
const SCRATCH: Hpa = Hpa::new(0x4000);
const EPT01: u64 = 0x5000;
/// Calls to the host that one exit may take.
const CALLS: u64 = 8_192 + 2_048 * POOL_FRAMES as u64;

/// A processor that keeps what is written.
struct Paper {
    ram: Vec<u64>,
    regions: BTreeMap<Hpa, Box<[u64; SLOTS]>>,
    current: Hpa,
    frames: BTreeMap<Hpa, Vec<u64>>,
    rng: Rng,
    /// Another processor changes one word in so many that the engine reads; 0 is none.
    odds: u64,
    calls: std::cell::Cell<u64>,
}

impl Paper {
    fn new(seed: u64, odds: u64) -> Self {
        let fields = || Box::new([0; SLOTS]);
        let frames = (0..u64::from(POOL_FRAMES)).map(|number| Hpa::new(POOL + (number << 12)));
        Self {
            ram: vec![0; (RAM / 8) as usize],
            regions: BTreeMap::from([(VMCS01, fields()), (VMCS02, fields())]),
            current: VMCS01,
            frames: frames.chain([BITMAP, SCRATCH]).map(|frame| (frame, vec![0; 512])).collect(),
            rng: Rng::new(seed),
            odds,
            calls: Default::default(),
        }
    }

    fn call(&self) {
        self.calls.set(self.calls.get() + 1);
        assert!(self.calls.get() <= CALLS, "too many calls for one exit");
    }

    fn get(&self, field: Field) -> u64 {
        self.regions[&self.current][field.slot()] & field.width().mask()
    }

    fn set(&mut self, field: Field, value: u64) {
        let fields = self.regions.get_mut(&self.current);
        fields.expect("a region")[field.slot()] = value & field.width().mask();
    }

    fn word(&mut self, gpa: L1Gpa) -> Option<&mut u64> {
        if gpa.page().as_u64() == HIDDEN {
            return None;
        }
        self.ram.get_mut((gpa.as_u64() >> 3) as usize)
    }

    fn load(&mut self, gpa: L1Gpa) -> u64 {
        let value = self.word(gpa).map_or(u64::MAX, |word| *word);
        if self.odds != 0 && self.rng.one_in(self.odds) {
            let other =
                if self.rng.one_in(2) { self.rng.next() } else { value ^ 1 << self.rng.below(64) };
            if let Some(word) = self.word(gpa) {
                *word = other;
            }
        }
        value
    }
}

impl Vmx for Paper {
    fn vmread(&mut self, field: Field) -> HostResult<u64> {
        self.call();
        Ok(self.get(field))
    }

    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        self.call();
        self.set(field, value);
        Ok(())
    }

    fn vmptrld(&mut self, region: Hpa) -> HostResult {
        self.call();
        assert!(region == VMCS01 || region == VMCS02, "{region:?} is no VMCS");
        self.current = region;
        Ok(())
    }

    fn invept(&mut self, _: InvEpt) -> HostResult {
        self.call();
        Ok(())
    }

    fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        self.call();
        let vpid = match scope {
            InvVpid::Address(vpid, _) | InvVpid::Single(vpid) | InvVpid::RetainGlobals(vpid) => {
                vpid
            }
            InvVpid::All => 1,
        };
        assert_ne!(vpid, 0, "VPID 0000H is no operand");
        Ok(())
    }

    fn write_cr2(&mut self, _: Gva) {
        self.call();
    }
}

impl L1Memory for Paper {
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]) {
        self.call();
        for (at, byte) in (gpa.as_u64()..).zip(buffer) {
            *byte = (self.load(L1Gpa::new(at & !7)) >> (at % 8 * 8)) as u8;
        }
    }

    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]) {
        self.call();
        for (at, byte) in (gpa.as_u64()..).zip(bytes) {
            if let Some(word) = self.word(L1Gpa::new(at)) {
                let shift = at % 8 * 8;
                *word = *word & !(0xff << shift) | u64::from(*byte) << shift;
            }
        }
    }

    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        self.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        self.load(gpa)
    }

    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        self.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        if let Some(word) = self.word(gpa) {
            *word = value;
        }
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        let _ = self.load(gpa);
        let Some(word) = self.word(gpa) else { return u64::MAX };
        let found = *word;
        if found == old {
            *word = new;
        }
        found
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.call();
        assert!(gpa.is_aligned(4), "{gpa:?}");
        let shift = (gpa.as_u64() & 4) * 8;
        let Some(word) = self.word(gpa) else { return u32::MAX };
        let found = (*word >> shift) as u32;
        if found == old {
            *word = *word & !(0xffff_ffff << shift) | u64::from(new) << shift;
        }
        found
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        self.call();
        assert!(gpa.page_offset() + 8 * entries.len() as u64 <= 4096, "{gpa:?}");
        for (at, entry) in (gpa.as_u64()..).step_by(8).zip(entries) {
            *entry = self.load(L1Gpa::new(at));
        }
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        self.call();
        let hidden = gpa.page().as_u64() == HIDDEN || !gpa.fits(40);
        let (hpa, permissions) = if hidden {
            (ONES | gpa.page_offset(), EptPermissions::READ)
        } else {
            (PLACE + gpa.as_u64(), EptPermissions::all())
        };
        let size_shift = if gpa.as_u64() < RAM { 12 } else { 21 };
        L1Mapping { hpa: Hpa::new(hpa), permissions, memory_type: memory_type::WB, size_shift }
    }
}

impl Frames for Paper {
    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.call();
        self.frames[&frame][index]
    }

    fn store(&mut self, frame: Hpa, index: usize, value: u64) {
        self.call();
        self.frames.get_mut(&frame).expect("a frame of the engine's")[index] = value;
    }

    fn fill(&mut self, frame: Hpa, value: u64) {
        self.call();
        self.frames.get_mut(&frame).expect("a frame of the engine's").fill(value);
    }
}

impl Msrs for Paper {
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrFault> {
        self.call();
        match index {
            msr::EFER => Ok(self.get(Field::GUEST_EFER)),
            msr::PAT => Ok(self.get(Field::GUEST_PAT)),
            0x1234 => Err(MsrFault),
            _ => Ok(self.rng.next()),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.call();
        match index {
            msr::EFER => self.set(Field::GUEST_EFER, value & 0xd01),
            msr::PAT => self.set(Field::GUEST_PAT, value & 0x0707_0707_0707_0707),
            _ if self.rng.one_in(4) => return Err(MsrFault),
            _ => {}
        }
        Ok(())
    }

    fn may_pass_read(&self, index: u32) -> bool {
        index & 1 == 0
    }

    fn may_pass_write(&self, index: u32) -> bool {
        index & 3 == 0
    }
}

/// L1's memory, to be filled.
impl Platform for Paper {
    fn execute(&mut self, _: usize, operation: &Operation) -> Outcome {
        unreachable!("{operation:?}")
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        self.word(at).map_or(u64::MAX, |word| *word)
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        if let Some(word) = self.word(at) {
            *word = value;
        }
    }
}

/// A processor that can do everything.
fn everything() -> Caps {
    let model = ModelCaps::default();
    let hardware = HardwareCaps {
        msrs: HardwareCaps::read_msrs(|index| {
            let value = model.msr(index).unwrap_or(0);
            match index {
                msr::VMX_PINBASED_CTLS..=msr::VMX_ENTRY_CTLS
                | msr::VMX_PROCBASED_CTLS2
                | msr::VMX_TRUE_PINBASED_CTLS..=msr::VMX_TRUE_ENTRY_CTLS => {
                    value | 0xffff_ffff_0000_0000
                }
                _ => value,
            }
        }),
        ..caps::hardware_caps(&model)
    };
    Caps::offered(&hardware).expect("it can do everything")
}

fn number(rng: &mut Rng) -> u64 {
    let page = rng.below(layout::PAGES as u64) << 12;
    match rng.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => rng.next(),
        3 => 1 << rng.below(64),
        4 => page | rng.below(4096),
        5 => page,
        6 => HIDDEN,
        7 => RAM,
        8 => (1 << 40) - 0x1000,
        9 => rng.below(64),
        10 => layout::eptp(rng.below(4) as usize, rng.one_in(2)),
        _ => rng.below(1 << 32),
    }
}

struct Attack {
    host: Paper,
    nested: Nested,
    processor: nvmx::Processor,
    gprs: Gprs,
    rng: Rng,
    good: Vec<(Field, u64)>,
    entries: u64,
    exits: u64,
    /// Entries with a virtual-APIC page, an APIC-access page, and I/O bitmaps.
    pages: [u64; 3],
    dead: bool,
}

/// Numbers of the general registers.
const RAX: usize = 0;
const RCX: usize = 1;
const RBX: usize = 3;

impl Attack {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let odds = rng.pick(&[0, 0, 10, 100]);
        let mut host = Paper::new(seed, 0);
        let caps = everything();
        let model = caps::bare_caps(&ModelCaps::default());
        let setup = Program::default().setup;
        layout::initialise(&mut host, &model, &setup);
        let nested = Nested::new(Config {
            sizes: AddressSizes { physical_width: 40, gigabyte_pages: true },
            caps,
            frames: Hpa::new(POOL),
            frame_count: POOL_FRAMES,
            roots: 5,
            processors: 1,
            vmcs_cache: 3,
            vmfunc: VmfuncMode::Emulated,
            ept01: Eptp::from(EPT01 | 3 << 3 | 6),
            stint: None,
        });
        let l1 = layout::l1_registers(0);
        let state = [
            (Field::GUEST_CR0, l1.cr0),
            (Field::GUEST_CR3, l1.cr3),
            (Field::GUEST_CR4, l1.cr4),
            (Field::CR4_SHADOW, l1.cr4),
            (Field::GUEST_EFER, l1.efer),
            (Field::GUEST_PAT, l1.pat),
            (Field::GUEST_RFLAGS, 2),
            (Field::GUEST_CS_AR, 0xa09b),
            (Field::GUEST_SS_AR, 0xc093),
            (Field::GUEST_DS_AR, 0xc093),
        ];
        for (field, value) in state {
            host.set(field, value);
        }
        let started = nested.processor(&mut host, 0, VMCS01, VMCS02, BITMAP, SCRATCH);
        let processor = started.expect("paper refuses nothing");
        let good = layout::vmcs_fields(&model, &setup, 0, 0);
        let gprs = Gprs { values: [0; 16] };
        let (entries, exits, pages, dead) = (0, 0, [0; 3], false);
        let mut attack =
            Self { host, nested, processor, gprs, rng, good, entries, exits, pages, dead };
        let revision = attack.nested.caps().basic.revision();
        for region in [layout::vmxon(0), layout::vmcs(0, 0)] {
            attack.host.poke(L1Gpa::new(region), revision.into());
        }
        attack.pointer(ExitReason::VMXON, layout::vmxon(0));
        attack.pointer(ExitReason::VMCLEAR, layout::vmcs(0, 0));
        attack.pointer(ExitReason::VMPTRLD, layout::vmcs(0, 0));
        attack.make_good();
        attack.host.odds = odds;
        attack
    }

    /// L1 exits, or L2.
    fn exit(&mut self, reason: ExitReason) {
        self.host.calls.set(0);
        self.host.set(Field::EXIT_REASON, reason.bits().into());
        self.exits += 1;
        let l2 = self.processor.runs_l2();
        let Self { host, nested, processor, gprs, .. } = self;
        let handled = if l2 {
            nested.l2_exit(processor, host, gprs, reason)
        } else {
            nested.l1_exit(processor, host, gprs, reason)
        };
        match handled {
            Ok(Handled::Shutdown) => self.dead = true,
            Ok(_) => {}
            Err(error) => panic!("{reason:?} of L{}: {error:?}", 1 + u8::from(l2)),
        }
        if self.processor.is_behind() {
            let Self { host, nested, processor, .. } = self;
            nested.catch_up(processor, host).expect("paper refuses nothing");
        }
        let expected = if self.processor.runs_l2() { VMCS02 } else { VMCS01 };
        assert_eq!(self.host.current, expected, "after {reason:?}");
        if self.processor.runs_l2() {
            self.entries += u64::from(!l2);
            self.check_vmcs02(!l2);
        }
    }

    /// What the processor would use of vmcs02 by its physical address.
    fn check_vmcs02(&mut self, entered: bool) {
        let Self { host, pages, .. } = self;
        let get = |field| host.get(field);
        let proc = ProcCtls::from_bits_retain(get(Field::PROC_CTLS) as u32);
        let proc2 = ProcCtls2::from_bits_retain(get(Field::PROC_CTLS2) as u32);
        let is_l1 = |page: u64| (PLACE..PLACE + (1 << 40)).contains(&page) && page & 0xfff == 0;
        if proc.contains(ProcCtls::IO_BITMAPS) {
            pages[2] += u64::from(entered);
            for page in [get(Field::IO_BITMAP_A), get(Field::IO_BITMAP_B)] {
                assert!(is_l1(page) || page == ONES, "I/O bitmap at {page:#x}");
            }
        }
        if proc.contains(ProcCtls::TPR_SHADOW) {
            pages[0] += u64::from(entered);
            // The processor writes there.
            let page = get(Field::VIRTUAL_APIC_ADDR);
            assert!(is_l1(page) || page == SCRATCH.as_u64(), "virtual-APIC page at {page:#x}");
        }
        if proc2.contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES) {
            pages[1] += u64::from(entered);
            let page = get(Field::APIC_ACCESS_ADDR);
            assert!(is_l1(page) || page == ONES, "APIC-access page at {page:#x}");
        }
        assert!(proc.contains(ProcCtls::MSR_BITMAPS | ProcCtls::SECONDARY_CONTROLS));
        assert!(proc2.contains(ProcCtls2::EPT | ProcCtls2::VPID));
        assert_eq!(get(Field::MSR_BITMAP), BITMAP.as_u64());
        assert!(get(Field::VPID) > 1);
        let table = Eptp::from(get(Field::EPT_POINTER)).table();
        let pool = POOL..POOL + (u64::from(POOL_FRAMES) << 12);
        assert!(pool.contains(&table) || table == EPT01, "EPTP at {table:#x}");
        for count in
            [Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_COUNT]
        {
            assert_eq!(get(count), 0, "{count:?}");
        }
    }

    /// An instruction with a memory operand that holds an address.
    fn pointer(&mut self, reason: ExitReason, address: u64) {
        let at = layout::operands(0);
        self.host.poke(L1Gpa::new(at), address);
        self.gprs.values[RBX] = at;
        // 64-bit addressing, DS, no index, base RBX.
        self.host.set(Field::EXIT_INSTRUCTION_INFO, 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23);
        self.host.set(Field::EXIT_QUALIFICATION, 0);
        self.exit(reason);
    }

    /// VMWRITE from RAX of the field in RCX.
    fn vmwrite(&mut self, field: Field, value: u64) {
        self.gprs.values[RAX] = value;
        self.gprs.values[RCX] = field.encoding().into();
        self.host.set(Field::EXIT_INSTRUCTION_INFO, 1 << 10 | 1 << 28);
        self.exit(ExitReason::VMWRITE);
    }

    fn make_good(&mut self) {
        for number in 0..self.good.len() {
            let (field, value) = self.good[number];
            self.vmwrite(field, value);
        }
        // Some of what the engine offers and the model has not.
        for (field, bit) in [
            (Field::PROC_CTLS, ProcCtls::TPR_SHADOW.bits()),
            (Field::PROC_CTLS, ProcCtls::IO_BITMAPS.bits()),
            (Field::PROC_CTLS2, ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits()),
            (Field::PIN_CTLS, vmx_defs::PinCtls::PREEMPTION_TIMER.bits()),
        ] {
            if self.rng.one_in(2) {
                let before = self.good.iter().rev().find(|(other, _)| *other == field);
                let before = before.map_or(0, |(_, value)| *value);
                self.vmwrite(field, before | u64::from(bit));
            }
        }
        let page = self.rng.pick(&[layout::L1_DATA, HIDDEN, RAM, (1 << 40) - 0x1000]);
        self.vmwrite(Field::VIRTUAL_APIC_ADDR, page);
        let page = self.rng.pick(&[layout::L1_DATA, HIDDEN, RAM, layout::guest_data(0, 0)]);
        self.vmwrite(Field::APIC_ACCESS_ADDR, page);
        let page = self.rng.pick(&[layout::IO_BITMAP, HIDDEN, RAM]);
        self.vmwrite(Field::IO_BITMAP_A, page);
    }

    fn step(&mut self) {
        if self.rng.one_in(8) {
            let (at, value) = (self.rng.below(RAM) & !7, number(&mut self.rng));
            // L1's own page tables stay, so that it goes on.
            if at >= layout::L1_WINDOW_PT {
                self.host.poke(L1Gpa::new(at), value);
            }
        }
        for register in &mut self.gprs.values {
            if self.rng.one_in(4) {
                *register = number(&mut self.rng);
            }
        }
        if self.processor.runs_l2() {
            self.l2_exit();
            return;
        }
        match self.rng.below(8) {
            0 | 1 => {
                let (field, _) = FIELDS[self.rng.below(FIELDS.len() as u64) as usize];
                let value = number(&mut self.rng);
                self.vmwrite(field, value);
            }
            2 => self.make_good(),
            3 => {
                let reason = self.rng.pick(&[
                    ExitReason::VMCLEAR,
                    ExitReason::VMPTRLD,
                    ExitReason::VMPTRST,
                    ExitReason::VMREAD,
                    ExitReason::VMWRITE,
                    ExitReason::VMXON,
                    ExitReason::VMXOFF,
                    ExitReason::INVEPT,
                    ExitReason::INVVPID,
                    ExitReason::VMCALL,
                ]);
                let information = self.rng.next();
                self.host.set(Field::EXIT_INSTRUCTION_INFO, information);
                let qualification = number(&mut self.rng);
                self.host.set(Field::EXIT_QUALIFICATION, qualification);
                self.exit(reason);
                self.pointer(ExitReason::VMXON, layout::vmxon(0));
                self.pointer(ExitReason::VMPTRLD, layout::vmcs(0, 0));
            }
            4 => self.exit(ExitReason::VMRESUME),
            _ => {
                self.exit(ExitReason::VMLAUNCH);
                if !self.processor.runs_l2() {
                    self.exit(ExitReason::VMRESUME);
                }
                if !self.processor.runs_l2() && !self.dead && self.rng.one_in(2) {
                    self.make_good();
                    self.exit(ExitReason::VMRESUME);
                }
            }
        }
    }

    /// L2 exits for any reason, with anything in the fields.
    fn l2_exit(&mut self) {
        for (field, _) in FIELDS {
            let wild = match field.kind() {
                Kind::ReadOnly => self.rng.one_in(2),
                Kind::Guest => self.rng.one_in(100),
                _ => false,
            };
            if wild && *field != Field::VMCS_LINK_POINTER {
                let value = number(&mut self.rng);
                self.host.set(*field, value);
            }
        }
        let reason = match self.rng.below(8) {
            0..=2 => ExitReason::EPT_VIOLATION,
            3 => ExitReason::EPT_MISCONFIGURATION,
            4 => self.rng.pick(&[ExitReason::VMFUNC, ExitReason::CR_ACCESS, ExitReason::RDMSR]),
            5 => self.rng.pick(&[ExitReason::WRMSR, ExitReason::EXCEPTION_OR_NMI]),
            6 => ExitReason::from_bits(self.rng.below(80) as u32),
            _ => ExitReason::from_bits(ExitReason::ENTRY_GUEST_STATE.bits() | 1 << 31),
        };
        if reason == ExitReason::EPT_VIOLATION && self.rng.one_in(2) {
            let page = layout::DATA + self.rng.below(layout::DATA_PAGES);
            self.host.set(Field::GUEST_PHYSICAL_ADDRESS, page << 12);
            self.host.set(Field::EXIT_QUALIFICATION, 1 << self.rng.below(3) | 3 << 7);
        }
        if reason == ExitReason::VMFUNC {
            self.gprs.values[RAX] = self.rng.below(2);
            self.gprs.values[RCX] = self.rng.below(514);
        }
        self.exit(reason);
    }
}

#[test]
fn every_exit_has_an_answer() {
    let (mut entries, mut exits, mut pages, mut dead) = (0, 0, [0; 3], 0);
    seeds::each("exits", 1500, |seed| {
        let mut attack = Attack::new(seed);
        for _ in 0..120 {
            if attack.dead {
                break;
            }
            attack.step();
        }
        entries += attack.entries;
        exits += attack.exits;
        for (sum, count) in pages.iter_mut().zip(attack.pages) {
            *sum += count;
        }
        dead += u64::from(attack.dead);
    });
    println!("{entries} entries ({pages:?} with pages), {exits} exits, {dead} shut down");
    assert!(pages.iter().all(|count| *count > 0));
}
