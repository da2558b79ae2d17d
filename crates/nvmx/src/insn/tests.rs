//! Do the decoded operands and faults agree with the SDM, case by case?

use super::*;
use crate::paging::{CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, EFER_NXE, PageFault, error_code};
use crate::testing::TestHost;
use alloc::vec::Vec;
use proptest::prelude::*;

const SIZES: AddressSizes = AddressSizes { physical_width: 40, gigabyte_pages: true };
const RAX: u8 = 0;
const RBX: u8 = 3;
const RSI: u8 = 6;
/// Writable data, present, 32-bit.
const DATA: u64 = 0x4093;
/// Readable code, present.
const CODE: u64 = 0x409b;

const ALL: [Instruction; 12] = [
    Instruction::Invept,
    Instruction::Invvpid,
    Instruction::Vmcall,
    Instruction::Vmclear,
    Instruction::Vmlaunch,
    Instruction::Vmptrld,
    Instruction::Vmptrst,
    Instruction::Vmread,
    Instruction::Vmresume,
    Instruction::Vmwrite,
    Instruction::Vmxoff,
    Instruction::Vmxon,
];

/// 64-bit mode with paging off, which no processor has: operands are where their address says, and
/// what is tested is the address.
fn long() -> TestHost {
    let mut host = TestHost::new(0x1_0000);
    host.set(Field::GUEST_EFER, EFER_LMA | EFER_NXE);
    host.set(Field::GUEST_CS_AR, 0xa09b);
    host.set(Field::GUEST_SS_AR, DATA);
    host.set(Field::GUEST_CR0, CR0_PE);
    host.set(Field::GUEST_CR4, CR4_PAE | CR4_VMXE);
    host
}

/// Protected mode without paging, all segments flat.
fn protected() -> TestHost {
    let mut host = TestHost::new(0x1_0000);
    host.set(Field::GUEST_CR0, CR0_PE);
    for (rights, limit) in [
        (Field::GUEST_ES_AR, Field::GUEST_ES_LIMIT),
        (Field::GUEST_SS_AR, Field::GUEST_SS_LIMIT),
        (Field::GUEST_DS_AR, Field::GUEST_DS_LIMIT),
        (Field::GUEST_FS_AR, Field::GUEST_FS_LIMIT),
        (Field::GUEST_GS_AR, Field::GUEST_GS_LIMIT),
    ] {
        host.set(rights, DATA);
        host.set(limit, 0xffff_ffff);
    }
    host.set(Field::GUEST_CS_AR, CODE);
    host.set(Field::GUEST_CS_LIMIT, 0xffff_ffff);
    host
}

/// Instruction information of a memory operand in DS: no base, no index.
fn info(address_size: u8) -> InstructionInfo {
    InstructionInfo::new()
        .with_address_size(address_size)
        .with_segment(3)
        .with_base_invalid(true)
        .with_index_invalid(true)
}

fn operands(mode: Mode, info: InstructionInfo) -> Operands {
    Operands { mode, info, sizes: SIZES }
}

#[test]
fn exits_name_their_instructions() {
    let mut found = Vec::new();
    for reason in 0..80 {
        found.extend(Instruction::from_exit(ExitReason::from_bits(reason)));
    }
    assert_eq!(found.len(), ALL.len());
    assert!(ALL.iter().all(|instruction| found.contains(instruction)));
    assert_eq!(Instruction::from_exit(ExitReason::VMFUNC), None);
}

#[test]
fn mode_and_privilege_in_every_combination() {
    for instruction in ALL {
        for n in 0..128u32 {
            let bit = |i: u32| n >> i & 1 != 0;
            let (lma, l, pe, vm) = (bit(0), bit(1), bit(2), bit(3));
            let (in_vmx, vmxe, privileged) = (bit(4), bit(5), bit(6));
            if lma && (!pe || vm) {
                continue;
            }
            let mut host = TestHost::new(0);
            host.set(Field::GUEST_EFER, if lma { EFER_LMA } else { 0 });
            host.set(Field::GUEST_CS_AR, CODE | if l { 1 << 13 } else { 0 });
            host.set(Field::GUEST_CR0, u64::from(pe));
            host.set(Field::GUEST_RFLAGS, if vm { RFLAGS_VM } else { 0 } | 2);
            // The register has VMXE set always; L1 sees the shadow.
            host.set(Field::GUEST_CR4, CR4_VMXE);
            host.set(Field::CR4_MASK, CR4_VMXE);
            host.set(Field::CR4_SHADOW, if vmxe { CR4_VMXE } else { 0 });
            host.set(Field::GUEST_SS_AR, DATA | if privileged { 0 } else { 3 << 5 });

            let bad_mode = !pe || vm || (lma && !l);
            let no_vmx = !in_vmx && (instruction != Instruction::Vmxon || !vmxe);
            let expected = if bad_mode || no_vmx {
                Err(Fault::Ud)
            } else if !privileged {
                Err(Fault::Gp(0))
            } else if lma {
                Ok(Mode::Long64)
            } else {
                Ok(Mode::Protected)
            };
            assert_eq!(
                instruction.check(&mut host, in_vmx),
                Ok(expected),
                "{instruction:?} {n:#b}"
            );
        }
    }
}

#[test]
fn each_ring_above_0_is_refused() {
    for cpl in 0..4 {
        let mut host = long();
        host.set(Field::GUEST_SS_AR, 0x4093 | cpl << 5);
        let result = Instruction::Vmread.check(&mut host, true);
        let expected = if cpl == 0 { Ok(Mode::Long64) } else { Err(Fault::Gp(0)) };
        assert_eq!(result, Ok(expected));
    }
}

/// Linear address of an 8-byte operand that is read.
fn linear(
    host: &mut TestHost,
    gprs: &Gprs,
    mode: Mode,
    info: InstructionInfo,
    displacement: u64,
) -> Result<u64, Fault> {
    host.set(Field::EXIT_QUALIFICATION, displacement);
    operands(mode, info)
        .linear_address(host, gprs, 8, Access::Read)
        .unwrap()
        .map(|address| address.as_u64())
}

#[test]
fn addresses_in_64_bit_mode() {
    let mut host = long();
    host.set(Field::GUEST_RSP, 0x7000);
    host.set(Field::GUEST_FS_BASE, 0xffff_9000_0000_0000);
    host.set(Field::GUEST_GS_BASE, 0x10_0000);
    // 64-bit mode ignores these.
    host.set(Field::GUEST_DS_BASE, 0x5555_0000);
    host.set(Field::GUEST_DS_AR, 1 << 16);
    let mut gprs = Gprs::default();
    gprs.set(RAX, 0x1_2345_6789);
    gprs.set(RBX, 0xffff_ffff_ffff_fff0);
    gprs.set(RSI, 3);
    let based = |size, base| info(size).with_base_invalid(false).with_base(base);
    let indexed = |i: InstructionInfo, index, scaling| {
        i.with_index_invalid(false).with_index(index).with_scaling(scaling)
    };
    let cases = [
        (info(2), 0x1234, 0x1234),
        (info(2), (-8i64) as u64, (-8i64) as u64),
        (based(2, RAX), 0x10, 0x1_2345_6799),
        (based(2, RAX), (-0x89i64) as u64, 0x1_2345_6700),
        (based(2, RSP), 8, 0x7008),
        (based(2, RBX), 0x20, 0x10),
        (indexed(info(2), RSI, 3), 0x100, 0x118),
        (indexed(based(2, RSP), RSI, 2), 0, 0x700c),
        (indexed(based(2, RSP), RSI, 1), 0, 0x7006),
        (indexed(based(2, RSP), RSI, 0), 0, 0x7003),
        // Address-size prefix: the sum is cut to 32 bits, then the base is added.
        (based(1, RAX), 0x10, 0x2345_6799),
        (based(1, RBX), 0, 0xffff_fff0),
        (based(1, RAX).with_segment(5), 0, 0x2355_6789),
        (info(2).with_segment(4), 0x88, 0xffff_9000_0000_0088),
        (info(2).with_segment(5), 0x88, 0x10_0088),
        (info(2).with_segment(0), 0x88, 0x88),
        (info(2).with_segment(1), 0x88, 0x88),
        (info(2).with_segment(2), 0x88, 0x88),
    ];
    for (info, displacement, expected) in cases {
        let address = linear(&mut host, &gprs, Mode::Long64, info, displacement);
        assert_eq!(address, Ok(expected), "{info:?} {displacement:#x}");
    }
}

#[test]
fn addresses_that_are_not_canonical() {
    let mut host = long();
    let gprs = Gprs::default();
    for (address, ok) in [
        (0x0000_7fff_ffff_fff8u64, true),
        // The last byte is outside.
        (0x0000_7fff_ffff_fff9, false),
        (0x0000_8000_0000_0000, false),
        // The first byte is outside.
        (0xffff_7fff_ffff_ffff, false),
        (0xffff_8000_0000_0000, true),
    ] {
        for (segment, fault) in [(3, Fault::Gp(0)), (2, Fault::Ss(0)), (5, Fault::Gp(0))] {
            let info = info(2).with_segment(segment);
            let expected = if ok { Ok(address) } else { Err(fault) };
            assert_eq!(linear(&mut host, &gprs, Mode::Long64, info, address), expected);
        }
    }
    host.set(Field::GUEST_CR4, CR4_PAE | CR4_LA57);
    let far = 0x00ff_ffff_ffff_fff8;
    assert_eq!(linear(&mut host, &gprs, Mode::Long64, info(2), far), Ok(far));
    assert_eq!(linear(&mut host, &gprs, Mode::Long64, info(2), far + 1), Err(Fault::Gp(0)));
}

#[test]
fn addresses_in_protected_mode() {
    let mut host = protected();
    host.set(Field::GUEST_DS_BASE, 0x10_0000);
    host.set(Field::GUEST_SS_BASE, 0xffff_f000);
    host.set(Field::GUEST_RSP, 0x7_0000_1000);
    let mut gprs = Gprs::default();
    // Upper halves are what an earlier 64-bit mode left there.
    gprs.set(RBX, 0xdead_0000_0001_2345);
    gprs.set(RSI, 0xffff_fff0);
    let based = |size, base| info(size).with_base_invalid(false).with_base(base);
    let cases = [
        (info(1), 0x1234, 0x10_1234),
        (based(1, RBX), 0, 0x11_2345),
        (based(1, RSI), 0x20, 0x10_0010),
        (based(0, RBX), 0, 0x10_2345),
        (based(0, RBX), 0xffff_ffff_ffff_ffff, 0x10_2344),
        (based(0, RSI), 0x20, 0x10_0010),
        // The linear address wraps at 4 GBytes.
        (based(1, RSP).with_segment(2), 0x10, 0x10),
        (info(1).with_segment(1), 0x10, 0x10),
    ];
    for (info, displacement, expected) in cases {
        let address = linear(&mut host, &gprs, Mode::Protected, info, displacement);
        assert_eq!(address, Ok(expected), "{info:?} {displacement:#x}");
    }
}

#[test]
fn segment_types_and_limits() {
    let read = |rights| segment_allows(rights, 0xffff_ffff, 0x1000, 7, Access::Read);
    let write = |rights| segment_allows(rights, 0xffff_ffff, 0x1000, 7, Access::Write);
    let down_read = |rights| segment_allows(rights, 0xfff, 0x1000, 7, Access::Read);
    let down_write = |rights| segment_allows(rights, 0xfff, 0x1000, 7, Access::Write);
    for (kind, can_read, can_write) in [
        (0, true, false),
        (1, true, false),
        (2, true, true),
        (3, true, true),
        (8, false, false),
        (9, false, false),
        (10, true, false),
        (11, true, false),
        (12, false, false),
        (13, false, false),
        (14, true, false),
        (15, true, false),
    ] {
        let rights = 0x4090 | kind;
        assert_eq!((read(rights), write(rights)), (can_read, can_write), "{kind}");
    }
    for (kind, can_write) in [(4, false), (5, false), (6, true), (7, true)] {
        let rights = 0x4090 | kind;
        assert_eq!((down_read(rights), down_write(rights)), (true, can_write), "{kind}");
        assert!(!read(rights), "nothing is above the limit");
    }
    for rights in [DATA | 1 << 16, DATA & !0x80, DATA & !0x10] {
        assert!(!read(rights) && !write(rights), "{rights:#x}");
    }

    // (rights, limit, offset, last, allowed)
    for (rights, limit, offset, last, allowed) in [
        (DATA, 0xfff, 0xff8, 7, true),
        (DATA, 0xfff, 0xff9, 7, false),
        (DATA, 0xfff, 0x1000, 0, false),
        (DATA, 0, 0, 0, true),
        (DATA, 0xffff_ffff, 0xffff_fff8, 7, true),
        (DATA, 0xffff_ffff, 0xffff_fff9, 7, false),
        (0x4097, 0xfff, 0xfff, 7, false),
        (0x4097, 0xfff, 0x1000, 7, true),
        (0x4097, 0xfff, 0xffff_fff8, 7, true),
        (0x4097, 0xfff, 0xffff_fff9, 7, false),
        // D/B clear: the upper bound of an expand-down segment is FFFFH.
        (0x0097, 0xfff, 0xfff8, 7, true),
        (0x0097, 0xfff, 0xfff9, 7, false),
    ] {
        let text = (rights, limit, offset, last);
        assert_eq!(segment_allows(rights, limit, offset, last, Access::Read), allowed, "{text:x?}");
    }
}

#[test]
fn segment_faults_name_the_stack() {
    for (segment, rights, fault) in [
        (0, Field::GUEST_ES_AR, Fault::Gp(0)),
        (1, Field::GUEST_CS_AR, Fault::Gp(0)),
        (2, Field::GUEST_SS_AR, Fault::Ss(0)),
        (3, Field::GUEST_DS_AR, Fault::Gp(0)),
        (4, Field::GUEST_FS_AR, Fault::Gp(0)),
        (5, Field::GUEST_GS_AR, Fault::Gp(0)),
    ] {
        let mut host = protected();
        host.set(rights, 1 << 16);
        let result =
            linear(&mut host, &Gprs::default(), Mode::Protected, info(1).with_segment(segment), 0);
        assert_eq!(result, Err(fault));
    }
    // Code segments are never written.
    let mut host = protected();
    let cs = operands(Mode::Protected, info(1).with_segment(1));
    let result = cs.linear_address(&mut host, &Gprs::default(), 8, Access::Write);
    assert_eq!(result, Ok(Err(Fault::Gp(0))));
}

#[test]
fn registers_and_their_widths() {
    let mut host = long();
    host.set(Field::GUEST_RSP, 0x1111_2222_3333_4444);
    let mut gprs = Gprs { values: core::array::from_fn(|i| 0x1_0000_0000 * (i as u64 + 1) + 9) };
    for number in 0..16 {
        let value = register(&mut host, &gprs, number).unwrap();
        let expected = match number {
            4 => 0x1111_2222_3333_4444,
            n => 0x1_0000_0000 * (u64::from(n) + 1) + 9,
        };
        assert_eq!(value, expected);
        let info = InstructionInfo::new().with_is_register(true).with_reg1(number);
        let both = info.with_reg2(number);
        let (wide, narrow) = (operands(Mode::Long64, both), operands(Mode::Protected, both));
        assert_eq!(wide.source(&mut host, &gprs), Ok(Ok(expected)));
        assert_eq!(wide.encoding(&mut host, &gprs), Ok(expected));
        assert_eq!(narrow.source(&mut host, &gprs), Ok(Ok(expected & 0xffff_ffff)));
        assert_eq!(narrow.encoding(&mut host, &gprs), Ok(expected & 0xffff_ffff));

        assert_eq!(wide.store(&mut host, &mut gprs, !u64::from(number)), Ok(Ok(())));
        assert_eq!(register(&mut host, &gprs, number), Ok(!u64::from(number)));
        assert_eq!(narrow.store(&mut host, &mut gprs, 0xffff_ffff_0000_0001), Ok(Ok(())));
        assert_eq!(register(&mut host, &gprs, number), Ok(1));
    }
    assert_eq!(host.field(Field::GUEST_RSP), 1);
    assert_eq!(gprs.get(RSP), 0x5_0000_0009, "slot 4 is not touched");
}

#[test]
fn memory_operands_have_the_width_of_the_mode() {
    for (mut host, mode, size) in [(long(), Mode::Long64, 8), (protected(), Mode::Protected, 4)] {
        let mut gprs = Gprs::default();
        let operands = operands(mode, info(if size == 8 { 2 } else { 1 }));
        host.set(Field::EXIT_QUALIFICATION, 0x123);
        host.ram.bytes[0x123..0x12b].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let source = operands.source(&mut host, &gprs).unwrap().unwrap();
        let expected: u64 = 0x0807_0605_0403_0201 & mode.operand_mask();
        assert_eq!(source, expected);
        operands.store(&mut host, &mut gprs, u64::MAX).unwrap().unwrap();
        let ones = host.ram.bytes.iter().filter(|byte| **byte == 0xff).count();
        assert_eq!(ones, size);
        // Pointers have 64 bits in every mode.
        operands.store_pointer(&mut host, &gprs, 0x1122_3344_5566_7788).unwrap().unwrap();
        let pointer = operands.pointer(&mut host, &gprs).unwrap().unwrap();
        assert_eq!(pointer, L1Gpa::new(0x1122_3344_5566_7788));
    }
}

#[test]
fn invalidations() {
    let mut host = long();
    host.set(Field::EXIT_QUALIFICATION, 0x200);
    host.ram.bytes[0x200..0x210].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 2, 3, 0, 0, 0, 0, 0, 0, 4]);
    let mut gprs = Gprs::default();
    gprs.set(9, 0x1_0000_0002);
    let operands = operands(Mode::Long64, info(2).with_reg2(9));
    let expected = Invalidation {
        kind: 0x1_0000_0002,
        descriptor: [0x0200_0000_0000_0001, 0x0400_0000_0000_0003],
    };
    assert_eq!(operands.invalidation(&mut host, &gprs), Ok(Ok(expected)));
    let narrow = Operands { mode: Mode::Protected, ..operands };
    assert_eq!(narrow.invalidation_kind(&mut host, &gprs), Ok(2));
}

/// Protected mode with 32-bit paging: linear pages 10H and 11H are at physical pages 5 and 3.
fn paged(second: u32) -> TestHost {
    let mut host = protected();
    host.set(Field::GUEST_CR0, CR0_PE | CR0_PG | CR0_WP);
    host.set(Field::GUEST_CR3, 0x1000);
    host.set(Field::GUEST_CR4, CR4_PSE);
    for (at, value) in [(0x1000, 0x2003), (0x2040, 0x5003u32), (0x2044, second)] {
        host.ram.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    host
}

#[test]
fn operands_cross_pages_that_are_apart() {
    for size in [8, 16] {
        for head in 1..size {
            let mut host = paged(0x3003);
            host.set(Field::EXIT_QUALIFICATION, 0x1_1000 - head);
            let gprs = Gprs::default();
            let operands = operands(Mode::Protected, info(1));
            let pattern: [u8; 16] = core::array::from_fn(|i| i as u8 + 1);
            let (first, second) = (0x6000 - head as usize, 0x3000);
            let head = head as usize;
            if size == 8 {
                let bytes: [u8; 8] = core::array::from_fn(|i| pattern[i]);
                assert_eq!(operands.write_memory(&mut host, &gprs, bytes), Ok(Ok(())));
                assert_eq!(operands.read_memory::<8>(&mut host, &gprs), Ok(Ok(bytes)));
            } else {
                assert_eq!(operands.write_memory(&mut host, &gprs, pattern), Ok(Ok(())));
                assert_eq!(operands.read_memory::<16>(&mut host, &gprs), Ok(Ok(pattern)));
            }
            let size = size as usize;
            assert_eq!(host.ram.bytes[first..first + head], pattern[..head]);
            assert_eq!(host.ram.bytes[second..second + size - head], pattern[head..size]);
            assert_eq!(host.ram.bytes[second + size - head], 0);
        }
    }
}

#[test]
fn a_fault_in_the_second_page_writes_nothing() {
    // Not present; read-only.
    for (second, read_error, write_error) in [(0, Some(0), 0), (0x3001, None, 1)] {
        let mut host = paged(second);
        host.set(Field::EXIT_QUALIFICATION, 0x1_0ffc);
        let gprs = Gprs::default();
        let operands = operands(Mode::Protected, info(1));
        let fault = |error| Ok(Err(Fault::Pf(PageFault { error, address: Gva::new(0x1_1000) })));
        let write = operands.write_memory(&mut host, &gprs, [0xff; 8]);
        assert_eq!(write, fault(write_error | error_code::WRITE));
        assert!(host.ram.bytes[0x3000..].iter().all(|byte| *byte == 0));
        let read = operands.read_memory::<8>(&mut host, &gprs);
        match read_error {
            Some(error) => {
                assert_eq!(read, fault(error).map(|r: Result<(), _>| r.map(|()| [0; 8])))
            }
            None => assert_eq!(read, Ok(Ok([0; 8]))),
        }
        // An operand within the first page does not care.
        host.set(Field::EXIT_QUALIFICATION, 0x1_0ff8);
        assert_eq!(operands.write_memory(&mut host, &gprs, [0xff; 8]), Ok(Ok(())));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever L1's state, its page tables and the exit information are: no panic, and a write
    /// that faults has changed nothing but accessed and dirty flags.
    #[test]
    fn any_state_has_an_answer(
        fields in proptest::collection::vec(any::<u64>(), 64),
        gprs in any::<[u64; 16]>(),
        info in any::<u32>(),
        // A page of entries: the frame of one of nine pages (the last is no RAM), and flags, most
        // with the rights of the access.
        entries in proptest::collection::vec((0u64..9, any::<u64>(), 0u8..8), 512),
        long in any::<bool>(),
        likely in any::<bool>(),
        width in 36u8..=52,
    ) {
        let mut host = TestHost::new(0);
        let entry = |(frame, flags, kind): (u64, u64, u8)| match kind {
            0 => flags,
            1 => frame << 12 | flags & 0xfff,
            _ => frame << 12 | flags & 0x67 | 3,
        };
        for page in 0..8 {
            let rotated = entries.iter().cycle().skip(page * 77).take(512);
            host.ram.bytes.extend(rotated.flat_map(|e| entry(*e).to_le_bytes()));
        }
        for ((field, _), value) in vmx_defs::field::FIELDS.iter().zip(fields.iter().cycle()) {
            host.set(*field, *value);
        }
        if likely {
            host.set(Field::GUEST_EFER, if long { EFER_LMA | EFER_NXE } else { 0 });
            let paging = if long { CR4_PAE } else { 0 };
            host.set(Field::GUEST_CR4, host.field(Field::GUEST_CR4) & !CR4_PAE | paging);
            host.set(Field::GUEST_CR0, CR0_PE | CR0_PG | CR0_WP);
            host.set(Field::GUEST_CR3, 0x1000);
        }
        let sizes = AddressSizes { physical_width: width, gigabyte_pages: long };
        let mode = if long { Mode::Long64 } else { Mode::Protected };
        let operands = Operands { mode, info: info.into(), sizes };
        let gprs = Gprs { values: gprs };
        for instruction in ALL {
            prop_assert!(instruction.check(&mut host, long).is_ok());
        }
        let before = host.ram.bytes.clone();
        if operands.write_memory(&mut host, &gprs, [0x5a; 16]).unwrap().is_err() {
            let unflagged = |bytes: &[u8]| bytes.iter().map(|b| b & !0x60).collect::<Vec<_>>();
            prop_assert_eq!(unflagged(&before), unflagged(&host.ram.bytes));
        }
        prop_assert!(operands.read_memory::<16>(&mut host, &gprs).is_ok());
    }
}
