//! Where does a program find everything, and what is there when it begins?
//!
//! One memory map for all programs: L1's own tables, its VMX structures, four EPT hierarchies
//! ("views") and the paging structures of its guest in every mode. Views share some tables, map the
//! same guest-physical pages to different data, and two of them see another page table of the guest.
//! Every data page begins with a value that no other page has.

use vmx_defs::{Eptp, Field, L1Gpa};

use crate::caps::ModelCaps;
use crate::machine::Platform;
use crate::program::{GuestMode, Setup, VmSetup};
use crate::registers::{DescriptorTable, Registers, cr0, cr4, efer, gpr, segment};
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::msr::EptVpidCap;

/// Pages of RAM: 4 MiB.
pub const PAGES: usize = 1024;
/// Number of EPT hierarchies.
pub const VIEWS: usize = 4;
/// Greatest number of processors.
pub const PROCESSORS: usize = 4;
/// VMCSs of each processor.
pub const VMS: usize = 2;
/// Number of data pages of the guest.
pub const DATA_PAGES: u64 = 8;

/// Linear address in L1 of a window of eight pages with page-table entries of their own.
pub const L1_WINDOW: u64 = 0x4000_0000;
/// First guest-physical page of the guest's data, which is also its linear page in the first
/// address space.
pub const DATA: u64 = 0x20;
/// Guest-physical and linear address of a 2-MByte page of the guest.
pub const LARGE: u64 = 0x20_0000;
/// Linear address that the guest maps with a 2-MByte page to guest-physical 0, where EPT has
/// 4-KByte pages.
pub const FRAGMENTED: u64 = 0x40_0000;
/// Guest-physical and linear address of a 1-GByte page of the guest: RAM from 0 on.
pub const HUGE: u64 = 0x4000_0000;

const fn page(number: u64) -> u64 {
    number << 12
}

/// L1's PML4 table.
pub const L1_CR3: u64 = page(1);
const L1_PDPT: u64 = page(2);
const L1_PD: u64 = page(3);
const L1_WINDOW_PD: u64 = page(4);
/// L1's page table for [`L1_WINDOW`].
pub const L1_WINDOW_PT: u64 = page(5);
const L1_IDT: u64 = page(6);
const L1_TASK: u64 = page(7);
/// The MSR bitmaps.
pub const MSR_BITMAP: u64 = page(8);
/// I/O bitmap A; B is the next page.
pub const IO_BITMAP: u64 = page(9);
/// The EPTP list.
pub const EPTP_LIST: u64 = page(11);
/// Eight pages that [`L1_WINDOW`] maps at first.
pub const L1_DATA: u64 = page(16);

/// A page of one processor.
const fn own(processor: usize, number: u64) -> u64 {
    page(32 + 8 * processor as u64 + number)
}

/// VMXON region of a processor.
pub const fn vmxon(processor: usize) -> u64 {
    own(processor, 0)
}

/// VMCS region of a processor, the first or the second.
pub const fn vmcs(processor: usize, vm: usize) -> u64 {
    own(processor, 1 + vm as u64)
}

/// Whether an address lies in a page that holds a VMCS.
pub fn is_vmcs(address: u64) -> bool {
    let mut regions =
        (0..PROCESSORS).flat_map(|processor| (0..VMS).map(move |vm| vmcs(processor, vm)));
    regions.any(|region| region == address & 0x000f_ffff_ffff_f000)
}

/// Top of L1's stack on a processor.
pub const fn stack(processor: usize) -> u64 {
    own(processor, 4)
}

/// A page for operands of L1 on a processor.
pub const fn operands(processor: usize) -> u64 {
    own(processor, 4)
}

/// The virtualization-exception information area of a processor.
pub const fn ve_area(processor: usize) -> u64 {
    own(processor, 5)
}

/// The table of `level` (4 to 1) of a view. The fourth view shares all but the first level with the
/// first.
pub const fn ept_table(view: usize, level: u8) -> u64 {
    let owner = if view == 3 && level < 4 { 0 } else { view };
    page(80 + 4 * owner as u64 + 4 - level as u64)
}

/// The EPTP of a view.
pub fn eptp(view: usize, accessed_dirty: bool) -> u64 {
    let base = Eptp::new().with_memory_type(6).with_walk_length_minus_1(3);
    base.with_accessed_dirty(accessed_dirty).with_frame(ept_table(view, 4) >> 12).into_bits()
}

/// The L1 page that holds a page of the guest's structures (guest-physical pages 10H to 1FH).
pub const fn guest_structure(gpa_page: u64) -> u64 {
    page(128 + gpa_page - 0x10)
}

/// The guest's page table as the second view sees it.
pub const OTHER_PT: u64 = page(144);

/// The L1 page that holds a data page of the guest in a view.
pub const fn guest_data(view: usize, number: u64) -> u64 {
    let owner = if view == 3 { 0 } else { view };
    page(160 + 16 * owner as u64 + number)
}

/// Guest-physical pages of the guest's structures.
pub mod guest {
    /// PML4 table, PDPT, page directory and page table of the first address space.
    pub const LONG: u64 = 0x10;
    /// The same of the second.
    pub const LONG_2: u64 = 0x14;
    /// PDPTEs, page directory and page table of PAE paging.
    pub const PAE: u64 = 0x18;
    /// Page directory and page table of 32-bit paging.
    pub const BITS32: u64 = 0x1b;
    /// IDT of 64-bit gates.
    pub const IDT: u64 = 0x1d;
    /// Stack, TSS and operands.
    pub const STACK: u64 = 0x1e;
    /// IDT of 32-bit gates.
    pub const IDT32: u64 = 0x1f;
}

/// Guest-physical address of the guest's operands, which it may use for descriptors.
pub const GUEST_OPERANDS: u64 = page(guest::STACK) + 0x800;

/// CR3 values of the guest in a mode.
pub fn guest_cr3(mode: GuestMode) -> &'static [u64] {
    match mode {
        GuestMode::Long => const { &[page(guest::LONG), page(guest::LONG_2)] },
        // The second one has the first gigabyte at the place of the second.
        GuestMode::Pae => const { &[page(guest::PAE), page(guest::PAE) + 32] },
        GuestMode::Bits32 => const { &[page(guest::BITS32)] },
        GuestMode::Unpaged => &[0],
    }
}

/// The value that the first word of a data page has.
pub const fn mark(address: u64) -> u64 {
    0xda7a_0000_0000_0000 | address
}

/// Present, writable, user, in page tables.
pub const PWU: u64 = 7;
const LARGE_PAGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
/// Read, write, execute, write-back: an EPT leaf.
pub const EPT_LEAF: u64 = 7 | 6 << 3;

/// The pages that software can look at in the end: tables with their flags, and data.
pub fn visible_pages(setup: &Setup) -> Vec<u64> {
    let mut pages = vec![EPTP_LIST, L1_WINDOW_PT, OTHER_PT];
    pages.extend((0..VIEWS).flat_map(|view| (1..=4).map(move |level| ept_table(view, level))));
    pages.extend((guest::LONG..DATA).map(guest_structure));
    pages.extend(
        (0..3).flat_map(|view| (0..DATA_PAGES).map(move |number| guest_data(view, number))),
    );
    pages.extend((0..setup.processors).map(ve_area));
    pages
}

/// Fills memory.
pub fn initialise(platform: &mut impl Platform, caps: &ModelCaps, setup: &Setup) {
    let mut memory = Writer { platform };
    l1_structures(&mut memory, caps);
    for view in 0..VIEWS {
        view_structures(&mut memory, setup, view);
    }
    guest_structures(&mut memory);
    for number in 0..512 {
        let view = number as usize % VIEWS;
        memory.entry(EPTP_LIST, number, eptp(view, setup.accessed_dirty[view]));
    }
}

struct Writer<'a, P> {
    platform: &'a mut P,
}

impl<P: Platform> Writer<'_, P> {
    fn entry(&mut self, table: u64, index: u64, value: u64) {
        self.platform.poke(L1Gpa::new(table + 8 * index), value);
    }

    fn entry32(&mut self, table: u64, index: u64, value: u64) {
        let at = L1Gpa::new(table + 8 * (index / 2));
        let shift = 32 * (index & 1);
        let word = self.platform.peek(at) & !(0xffff_ffff << shift) | value << shift;
        self.platform.poke(at, word);
    }
}

fn l1_structures(memory: &mut Writer<'_, impl Platform>, caps: &ModelCaps) {
    memory.entry(L1_CR3, 0, L1_PDPT | 3);
    memory.entry(L1_PDPT, 0, L1_PD | 3);
    memory.entry(L1_PDPT, 1, L1_WINDOW_PD | 3);
    for number in 0..2 {
        memory.entry(L1_PD, number, number << 21 | LARGE_PAGE | 3);
    }
    memory.entry(L1_WINDOW_PD, 0, L1_WINDOW_PT | 3);
    for number in 0..8 {
        let data = L1_DATA + page(number);
        let global = if number == 7 { GLOBAL } else { 0 };
        memory.entry(L1_WINDOW_PT, number, data | 3 | global);
        memory.entry(data, 0, mark(data));
    }
    for vector in 0..256 {
        memory.entry(L1_IDT, 2 * vector, 0x8e00 << 32 | 8 << 16);
    }
    memory.entry(L1_TASK, 0, stack(0) << 32);
    for processor in 0..PROCESSORS {
        for region in [vmxon(processor), vmcs(processor, 0), vmcs(processor, 1)] {
            memory.entry(region, 0, caps.basic.revision().into());
        }
    }
}

fn view_structures(memory: &mut Writer<'_, impl Platform>, setup: &Setup, view: usize) {
    let table = |level| ept_table(view, level);
    memory.entry(table(4), 0, table(3) | 7);
    memory.entry(table(3), 0, table(2) | 7);
    memory.entry(table(3), 1, EPT_LEAF | LARGE_PAGE);
    memory.entry(table(2), 0, table(1) | 7);
    memory.entry(table(2), 1, LARGE | EPT_LEAF | LARGE_PAGE);
    // Without suppressed #VE, where the first level has it.
    let suppress = if setup.suppress_ve { 1 << 63 } else { 0 };
    for number in guest::LONG..DATA {
        memory.entry(table(1), number, guest_structure(number) | EPT_LEAF | suppress);
    }
    if view == 1 {
        memory.entry(table(1), guest::LONG + 3, OTHER_PT | EPT_LEAF | suppress);
    }
    for number in 0..DATA_PAGES {
        let data = guest_data(view, number);
        memory.entry(table(1), DATA + number, data | EPT_LEAF | suppress);
        memory.entry(data, 0, mark(data));
    }
}

fn guest_structures(memory: &mut Writer<'_, impl Platform>) {
    let real = guest_structure;
    for (first, turn) in [(guest::LONG, 0), (guest::LONG_2, 1)] {
        memory.entry(real(first), 0, page(first + 1) | PWU);
        memory.entry(real(first + 1), 0, page(first + 2) | PWU);
        memory.entry(real(first + 1), 1, HUGE | LARGE_PAGE | PWU);
        memory.entry(real(first + 2), 0, page(first + 3) | PWU);
        memory.entry(real(first + 2), 1, LARGE | LARGE_PAGE | PWU);
        memory.entry(real(first + 2), 2, LARGE_PAGE | PWU);
        page_table(memory, real(first + 3), turn, false);
    }
    page_table(memory, OTHER_PT, 3, false);

    memory.entry(real(guest::PAE), 0, page(guest::PAE + 1) | 1);
    memory.entry(real(guest::PAE), 5, page(guest::PAE + 1) | 1);
    memory.entry(real(guest::PAE + 1), 0, page(guest::PAE + 2) | PWU);
    memory.entry(real(guest::PAE + 1), 1, LARGE | LARGE_PAGE | PWU);
    memory.entry(real(guest::PAE + 1), 2, LARGE_PAGE | PWU);
    page_table(memory, real(guest::PAE + 2), 0, false);

    memory.entry32(real(guest::BITS32), 0, page(guest::BITS32 + 1) | PWU);
    memory.entry32(real(guest::BITS32), 1, LARGE_PAGE | PWU);
    page_table(memory, real(guest::BITS32 + 1), 0, true);

    for vector in 0..256 {
        memory.entry(real(guest::IDT), 2 * vector, 0x8e00 << 32 | 8 << 16);
        memory.entry(real(guest::IDT32), vector, 0x8e00 << 32 | 8 << 16);
    }
    // The first bytes of the TSS: the stack of CPL 0, for either size.
    let task = real(guest::STACK);
    memory.entry(task, 0, (page(guest::STACK) + 0x700) << 32);
    memory.entry(LARGE, 0, mark(LARGE));
    memory.entry(LARGE + 0x5000, 0, mark(LARGE + 0x5000));
}

/// A page table of the guest: identity, but that data pages are turned by `turn`. The last two are
/// global.
fn page_table(memory: &mut Writer<'_, impl Platform>, table: u64, turn: u64, narrow: bool) {
    for number in guest::LONG..DATA + DATA_PAGES {
        let frame = match number.checked_sub(DATA) {
            Some(data) if data < DATA_PAGES - 2 => DATA + (data + turn) % (DATA_PAGES - 2),
            _ => number,
        };
        let global = if number >= DATA + DATA_PAGES - 2 { GLOBAL } else { 0 };
        let value = page(frame) | PWU | global;
        if narrow {
            memory.entry32(table, number, value);
        } else {
            memory.entry(table, number, value);
        }
    }
}

/// The registers that L1 begins with on a processor: 64-bit mode, CR4.VMXE set.
pub fn l1_registers(processor: usize) -> Registers {
    let mut registers = Registers::long_mode(L1_CR3);
    registers.gprs[gpr::RSP] = stack(processor);
    registers.cr4 |= cr4::VMXE | cr4::PGE;
    registers.idtr = DescriptorTable { base: L1_IDT, limit: 0xfff };
    registers.segments[segment::TR].base = L1_TASK;
    registers
}

/// The fields that L1 writes for a VM, in order. `caps` is what L1 is offered.
pub fn vmcs_fields(
    caps: &ModelCaps,
    setup: &Setup,
    processor: usize,
    vm: usize,
) -> Vec<(Field, u64)> {
    let mut fields = host_fields(processor);
    let config = &setup.vms[vm];
    controls(&mut fields, caps, setup, processor, config);
    guest_fields(&mut fields, caps, config);
    fields.retain(|(field, _)| caps.supports(*field));
    fields
}

fn controls(
    fields: &mut Vec<(Field, u64)>,
    caps: &ModelCaps,
    setup: &Setup,
    processor: usize,
    config: &VmSetup,
) {
    let mut proc2 = ProcCtls2::INVPCID | ProcCtls2::RDTSCP;
    if config.vpid != 0 {
        proc2 |= ProcCtls2::VPID;
    }
    if config.view.is_some() {
        proc2 |= ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS;
        if config.mode == GuestMode::Unpaged {
            proc2 |= ProcCtls2::UNRESTRICTED_GUEST;
        }
        if setup.ve && caps.has_proc2(ProcCtls2::EPT_VIOLATION_VE) {
            proc2 |= ProcCtls2::EPT_VIOLATION_VE;
        }
    }
    let proc = ProcCtls::SECONDARY_CONTROLS | ProcCtls::MSR_BITMAPS | config.exits;
    let pin = PinCtls::NMI_EXITING;
    let exit = ExitCtls::HOST_ADDRESS_SPACE_SIZE
        | ExitCtls::SAVE_EFER
        | ExitCtls::LOAD_EFER
        | ExitCtls::SAVE_PAT
        | ExitCtls::LOAD_PAT;
    let mut entry = EntryCtls::LOAD_EFER | EntryCtls::LOAD_PAT;
    if config.mode == GuestMode::Long {
        entry |= EntryCtls::IA32E_MODE_GUEST;
    }
    let view = config.view.unwrap_or(0);
    let functions = if config.view.is_some() { VmFuncCtls::EPTP_SWITCHING.bits() } else { 0 };
    let flags = caps.ept_vpid.contains(EptVpidCap::ACCESSED_DIRTY) && setup.accessed_dirty[view];
    fields.extend([
        (Field::PIN_CTLS, caps.pin.adjust(pin.bits()).into()),
        (Field::PROC_CTLS, caps.proc.adjust(proc.bits()).into()),
        (Field::PROC_CTLS2, caps.proc2.adjust(proc2.bits()).into()),
        (Field::EXIT_CTLS, caps.exit.adjust(exit.bits()).into()),
        (Field::ENTRY_CTLS, caps.entry.adjust(entry.bits()).into()),
        (Field::VPID, config.vpid.into()),
        (Field::EPT_POINTER, eptp(view, flags)),
        (Field::VM_FUNCTION_CONTROLS, functions),
        (Field::EPTP_LIST_ADDRESS, EPTP_LIST),
        (Field::VE_INFORMATION_ADDR, ve_area(processor)),
        (Field::MSR_BITMAP, MSR_BITMAP),
        (Field::IO_BITMAP_A, IO_BITMAP),
        (Field::IO_BITMAP_B, IO_BITMAP + 0x1000),
        (Field::EXCEPTION_BITMAP, config.exceptions.into()),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ]);
}

fn host_fields(processor: usize) -> Vec<(Field, u64)> {
    let registers = l1_registers(processor);
    let selector = |number: usize| u64::from(registers.segments[number].selector);
    vec![
        (Field::HOST_CR0, registers.cr0),
        (Field::HOST_CR3, registers.cr3),
        (Field::HOST_CR4, registers.cr4),
        (Field::HOST_ES_SELECTOR, selector(segment::ES)),
        (Field::HOST_CS_SELECTOR, selector(segment::CS)),
        (Field::HOST_SS_SELECTOR, selector(segment::SS)),
        (Field::HOST_DS_SELECTOR, selector(segment::DS)),
        (Field::HOST_FS_SELECTOR, selector(segment::FS)),
        (Field::HOST_GS_SELECTOR, selector(segment::GS)),
        (Field::HOST_TR_SELECTOR, selector(segment::TR)),
        (Field::HOST_TR_BASE, L1_TASK),
        (Field::HOST_IDTR_BASE, L1_IDT),
        (Field::HOST_EFER, registers.efer),
        (Field::HOST_PAT, registers.pat),
        (Field::HOST_RIP, 0x2000),
        (Field::HOST_RSP, stack(processor)),
    ]
}

fn guest_fields(fields: &mut Vec<(Field, u64)>, caps: &ModelCaps, config: &VmSetup) {
    let long = config.mode == GuestMode::Long;
    let paged = config.mode != GuestMode::Unpaged;
    let mut control = cr0::PE | cr0::ET | cr0::NE | cr0::WP;
    if paged {
        control |= cr0::PG;
    }
    let mut extension = cr4::VMXE | cr4::PGE | config.cr4;
    match config.mode {
        GuestMode::Long | GuestMode::Pae => extension |= cr4::PAE,
        GuestMode::Bits32 => extension |= cr4::PSE,
        GuestMode::Unpaged => {}
    }
    if !long {
        extension &= !cr4::PCIDE;
    }
    let code = if long { 0xa09b } else { 0xc09b };
    let idt = if long { guest::IDT } else { guest::IDT32 };
    let efer = if long { efer::LME | efer::LMA | efer::NXE } else { efer::NXE };
    let efer = efer & caps.efer;
    for [selector, base, limit, rights] in &crate::exit::SEGMENT_FIELDS[..6] {
        let is_code = *selector == Field::GUEST_CS_SELECTOR;
        fields.extend([
            (*selector, if is_code { 8 } else { 0x10 }),
            (*base, 0),
            (*limit, 0xffff_ffff),
            (*rights, if is_code { code } else { 0xc093 }),
        ]);
    }
    fields.extend([
        (Field::GUEST_TR_SELECTOR, 0x18),
        (Field::GUEST_TR_BASE, page(guest::STACK)),
        (Field::GUEST_TR_LIMIT, 0x67),
        (Field::GUEST_TR_AR, 0x8b),
        (Field::GUEST_LDTR_AR, 1 << 16),
        (Field::GUEST_IDTR_BASE, page(idt)),
        (Field::GUEST_IDTR_LIMIT, 0xfff),
        (Field::GUEST_CR0, control),
        (Field::GUEST_CR3, guest_cr3(config.mode)[0]),
        (Field::GUEST_CR4, extension),
        // L1 keeps CR4.VMXE to itself.
        (Field::CR4_MASK, cr4::VMXE),
        (Field::CR4_SHADOW, 0),
        (Field::GUEST_DR7, 0x400),
        (Field::GUEST_EFER, efer),
        (Field::GUEST_PAT, 0x0007_0406_0007_0406),
        (Field::GUEST_RIP, 0x1_0000),
        (Field::GUEST_RSP, page(guest::STACK) + 0x600),
        (Field::GUEST_RFLAGS, 2),
    ]);
    if config.mode == GuestMode::Pae {
        fields.push((Field::GUEST_PDPTE0, page(guest::PAE + 1) | 1));
    }
}
