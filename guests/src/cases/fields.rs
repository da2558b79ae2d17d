//! Answers: does every VMCS field keep what is written to it, as wide as it is, and does every other
//! encoding fail?
//!
//! SDM Vol. 3C, "VMREAD, VMWRITE, and Encodings of VMCS Fields", "Software Access to Related
//! Structures" and "Initializing a VMCS"; Vol. 3D, Appendix B, "Field Encoding in VMCS".

use vmx_defs::{
    Field, VmInstructionError,
    field::{FIELDS, Kind, Width},
    msr,
};

use crate::{
    ensure, ensure_eq,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        self, Caps, Vmx,
        raw::{self, Code, Flags, Operands},
        rdmsr, vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "fields.control.16", run: |ctx| keep(ctx, Kind::Control, Width::W16) },
    Case { name: "fields.control.32", run: |ctx| keep(ctx, Kind::Control, Width::W32) },
    Case { name: "fields.control.64", run: |ctx| keep(ctx, Kind::Control, Width::W64) },
    Case { name: "fields.control.natural", run: |ctx| keep(ctx, Kind::Control, Width::Natural) },
    Case { name: "fields.guest.16", run: |ctx| keep(ctx, Kind::Guest, Width::W16) },
    Case { name: "fields.guest.32", run: |ctx| keep(ctx, Kind::Guest, Width::W32) },
    Case { name: "fields.guest.64", run: |ctx| keep(ctx, Kind::Guest, Width::W64) },
    Case { name: "fields.guest.natural", run: |ctx| keep(ctx, Kind::Guest, Width::Natural) },
    Case { name: "fields.host.16", run: |ctx| keep(ctx, Kind::Host, Width::W16) },
    Case { name: "fields.host.32", run: |ctx| keep(ctx, Kind::Host, Width::W32) },
    Case { name: "fields.host.64", run: |ctx| keep(ctx, Kind::Host, Width::W64) },
    Case { name: "fields.host.natural", run: |ctx| keep(ctx, Kind::Host, Width::Natural) },
    Case { name: "fields.read_only.32", run: |ctx| read_only(ctx, Width::W32) },
    Case { name: "fields.read_only.64", run: |ctx| read_only(ctx, Width::W64) },
    Case { name: "fields.read_only.natural", run: |ctx| read_only(ctx, Width::Natural) },
    Case { name: "fields.high.control", run: |ctx| high(ctx, Kind::Control) },
    Case { name: "fields.high.read_only", run: |ctx| high(ctx, Kind::ReadOnly) },
    Case { name: "fields.high.guest", run: |ctx| high(ctx, Kind::Guest) },
    Case { name: "fields.high.host", run: |ctx| high(ctx, Kind::Host) },
    Case { name: "fields.high_of_narrow.16", run: |ctx| high_of_narrow(ctx, Width::W16) },
    Case { name: "fields.high_of_narrow.32", run: |ctx| high_of_narrow(ctx, Width::W32) },
    Case { name: "fields.high_of_narrow.natural", run: |ctx| high_of_narrow(ctx, Width::Natural) },
    Case { name: "fields.absent", run: |ctx| absent(ctx, 0) },
    Case { name: "fields.absent.high", run: |ctx| absent(ctx, 1) },
    Case { name: "fields.unknown.bit_12", run: |ctx| unknown_bit(ctx, 12..13) },
    Case { name: "fields.unknown.bits_31_15", run: |ctx| unknown_bit(ctx, 15..32) },
    Case { name: "fields.unknown.bits_63_32", run: |ctx| unknown_bit(ctx, 32..64) },
    Case { name: "fields.unknown.beyond_vmcs_enum", run: beyond_enum },
    Case { name: "fields.vmcs_enum", run: vmcs_enum },
    Case { name: "fields.distinct", run: distinct },
    Case { name: "fields.survive_vmclear", run: survive_vmclear },
    Case { name: "fields.two_vmcs", run: two_vmcs },
    Case { name: "fields.many_vmcs", run: many_vmcs },
];

/// VMREAD and VMWRITE of any encoding.
struct Access {
    vmx: Vmx,
    page: Page,
    read: Code,
    write: Code,
}

impl Access {
    /// VMX operation with a current VMCS.
    fn new(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        let page = fresh(ctx, &vmx)?;
        let (read, write) = (Code::new(ctx, &raw::VMREAD), Code::new(ctx, &raw::VMWRITE));
        Ok(Self { vmx, page, read, write })
    }

    fn read(&self, encoding: u64) -> Result<(Flags, u64), Stop> {
        let operands = Operands { rcx: encoding, rax: UNTOUCHED, ..Operands::default() };
        match self.read.run(operands) {
            Ok(result) => Ok(result),
            Err(fault) => crate::fail!("VMREAD of {encoding:#x}: {fault:x?}"),
        }
    }

    fn write(&self, encoding: u64, value: u64) -> Result<Flags, Stop> {
        let operands = Operands { rcx: encoding, rax: value, ..Operands::default() };
        match self.write.run(operands) {
            Ok((flags, _)) => Ok(flags),
            Err(fault) => crate::fail!("VMWRITE of {encoding:#x}: {fault:x?}"),
        }
    }

    /// Both must fail with error 12, VMREAD leaving its register alone.
    fn expect_unsupported(&self, encoding: u64, what: &str) -> Verdict {
        let unsupported = u64::from(VmInstructionError::UnsupportedComponent.number());
        let result = self.read(encoding)?;
        ensure_eq!(result, (Flags::FailValid, UNTOUCHED), "VMREAD of {what} {encoding:#x}");
        ensure_eq!(error(), unsupported, "error of VMREAD of {what} {encoding:#x}");
        let result = self.write(encoding, 0)?;
        ensure_eq!(result, Flags::FailValid, "VMWRITE of {what} {encoding:#x}");
        ensure_eq!(error(), unsupported, "error of VMWRITE of {what} {encoding:#x}");
        Ok(())
    }

    fn existing(&self) -> impl Iterator<Item = Field> {
        let caps = self.vmx.caps;
        FIELDS.iter().map(|&(field, _)| field).filter(move |&field| caps.has_field(field))
    }
}

/// What is in the register that a failing VMREAD must not change.
const UNTOUCHED: u64 = 0x5A5A_1234_5A5A_1234;

fn error() -> u64 {
    vmcs::read(Field::VM_INSTRUCTION_ERROR)
}

/// A new VMCS, current.
fn fresh(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Result<Page, Stop> {
    let page = vmx.region(ctx);
    ensure_eq!(vmx::vmclear(page), Ok(()), "VMCLEAR");
    ensure_eq!(vmx::vmptrld(page), Ok(()), "VMPTRLD");
    Ok(page)
}

/// The bits that a field must keep: all that its width allows, save for the reserved bits of access
/// rights, which some processors do not store.
fn kept_bits(field: Field) -> u64 {
    match field {
        Field::GUEST_ES_AR
        | Field::GUEST_CS_AR
        | Field::GUEST_SS_AR
        | Field::GUEST_DS_AR
        | Field::GUEST_FS_AR
        | Field::GUEST_GS_AR
        | Field::GUEST_LDTR_AR
        | Field::GUEST_TR_AR => 0x1_F0FF,
        _ => field.width().mask(),
    }
}

const PATTERNS: [u64; 6] = [
    u64::MAX,
    0,
    0xAAAA_AAAA_AAAA_AAAA,
    0x5555_5555_5555_5555,
    0x0123_4567_89AB_CDEF,
    0x8000_0001_8000_8001,
];

/// Every pattern comes back, cut to the field's width.
fn patterns(access: &Access, field: Field) -> Verdict {
    let encoding = u64::from(field.encoding());
    for pattern in PATTERNS {
        ensure_eq!(access.write(encoding, pattern)?, Flags::Succeed, "VMWRITE of {field:?}");
        let (flags, value) = access.read(encoding)?;
        ensure_eq!(flags, Flags::Succeed, "VMREAD of {field:?}");
        ensure_eq!(value & !field.width().mask(), 0, "{field:?} beyond its width");
        let kept = kept_bits(field);
        ensure_eq!(value & kept, pattern & kept, "{field:?} after {pattern:#x}");
    }
    Ok(())
}

fn keep(ctx: &mut Ctx<'_>, kind: Kind, width: Width) -> Verdict {
    let access = Access::new(ctx)?;
    for field in access.existing() {
        if field.kind() == kind && field.width() == width {
            patterns(&access, field)?;
        }
    }
    Ok(())
}

/// VMWRITE of VM-exit information works where IA32_VMX_MISC bit 29 is set, and is error 13 elsewhere.
fn read_only(ctx: &mut Ctx<'_>, width: Width) -> Verdict {
    let access = Access::new(ctx)?;
    for field in access.existing() {
        if field.kind() != Kind::ReadOnly || field.width() != width {
            continue;
        }
        if access.vmx.caps.misc.vmwrite_any() {
            patterns(&access, field)?;
            continue;
        }
        let encoding = u64::from(field.encoding());
        let (_, before) = access.read(encoding)?;
        ensure_eq!(access.write(encoding, !before)?, Flags::FailValid, "VMWRITE of {field:?}");
        let number = VmInstructionError::ReadOnlyComponent.number();
        ensure_eq!(error(), number.into(), "error of VMWRITE of {field:?}");
        if field != Field::VM_INSTRUCTION_ERROR {
            ensure_eq!(access.read(encoding)?, (Flags::Succeed, before), "{field:?}");
        }
    }
    Ok(())
}

/// The high access reaches bits 63:32 alone, and the full access all.
fn high(ctx: &mut Ctx<'_>, kind: Kind) -> Verdict {
    const WHOLE: u64 = 0x1111_2222_3333_4444;
    const HALF: u64 = 0x9999_AAAA_BBBB_CCCC;
    let access = Access::new(ctx)?;
    for field in access.existing() {
        if field.kind() != kind || field.width() != Width::W64 {
            continue;
        }
        let (full, upper) = (u64::from(field.encoding()), u64::from(field.encoding()) | 1);
        if kind == Kind::ReadOnly && !access.vmx.caps.misc.vmwrite_any() {
            ensure_eq!(access.write(upper, 0)?, Flags::FailValid, "high VMWRITE of {field:?}");
            ensure_eq!(error(), 13, "error of the high VMWRITE of {field:?}");
            let (_, whole) = access.read(full)?;
            let result = access.read(upper)?;
            ensure_eq!(result, (Flags::Succeed, whole >> 32), "high VMREAD of {field:?}");
            continue;
        }
        ensure_eq!(access.write(full, WHOLE)?, Flags::Succeed, "VMWRITE of {field:?}");
        let result = access.read(upper)?;
        ensure_eq!(result, (Flags::Succeed, WHOLE >> 32), "high VMREAD of {field:?}");
        ensure_eq!(access.write(upper, HALF)?, Flags::Succeed, "high VMWRITE of {field:?}");
        let mixed = HALF << 32 | WHOLE & 0xFFFF_FFFF;
        ensure_eq!(access.read(full)?, (Flags::Succeed, mixed), "{field:?} after both");
        let result = access.read(upper)?;
        ensure_eq!(result, (Flags::Succeed, mixed >> 32), "high VMREAD of {field:?}");
        ensure_eq!(access.write(full, WHOLE)?, Flags::Succeed, "VMWRITE of {field:?}");
        ensure_eq!(access.read(full)?, (Flags::Succeed, WHOLE), "{field:?} after the third");
    }
    Ok(())
}

fn high_of_narrow(ctx: &mut Ctx<'_>, width: Width) -> Verdict {
    let access = Access::new(ctx)?;
    for (field, name) in FIELDS.iter().filter(|(field, _)| field.width() == width) {
        access.expect_unsupported(u64::from(field.encoding()) | 1, name)?;
    }
    Ok(())
}

/// A field whose control can't be 1 does not exist.
fn absent(ctx: &mut Ctx<'_>, access_type: u64) -> Verdict {
    let access = Access::new(ctx)?;
    for (field, name) in FIELDS.iter().filter(|(field, _)| !access.vmx.caps.has_field(*field)) {
        if access_type == 0 || field.width() == Width::W64 {
            access.expect_unsupported(u64::from(field.encoding()) | access_type, name)?;
        }
    }
    Ok(())
}

/// No field has one of these bits in its encoding.
fn unknown_bit(ctx: &mut Ctx<'_>, bits: core::ops::Range<u32>) -> Verdict {
    let access = Access::new(ctx)?;
    for bit in bits {
        for field in [
            Field::GUEST_ES_SELECTOR,
            Field::IO_BITMAP_A,
            Field::PIN_CTLS,
            Field::EXIT_REASON,
            Field::GUEST_RIP,
            Field::HOST_CR3,
        ] {
            let encoding = u64::from(field.encoding()) | 1 << bit;
            access.expect_unsupported(encoding, field.name())?;
        }
    }
    Ok(())
}

/// Encoding of the field of this kind, width (bits 14:13) and index.
fn encoding(kind: u64, width: u64, index: u64) -> u64 {
    width << 13 | kind << 10 | index << 1
}

fn highest_index() -> u64 {
    rdmsr(msr::VMX_VMCS_ENUM) >> 1 & 0x1FF
}

fn beyond_enum(ctx: &mut Ctx<'_>) -> Verdict {
    let access = Access::new(ctx)?;
    for kind in 0..4 {
        for width in 0..4 {
            for index in highest_index() + 1..0x200 {
                access
                    .expect_unsupported(encoding(kind, width, index), "index beyond the highest")?;
            }
        }
    }
    Ok(())
}

/// IA32_VMX_VMCS_ENUM covers all fields, and each known field exists exactly where its control does.
fn vmcs_enum(ctx: &mut Ctx<'_>) -> Verdict {
    let access = Access::new(ctx)?;
    let value = rdmsr(msr::VMX_VMCS_ENUM);
    ensure_eq!(value & !0x3FE, 0, "reserved bits of IA32_VMX_VMCS_ENUM");
    for kind in 0..4 {
        for width in 0..4 {
            for index in 0..=highest_index() {
                let encoding = encoding(kind, width, index);
                let succeeds = access.read(encoding)?.0 == Flags::Succeed;
                // Encodings unknown to this program may belong to newer features.
                if let Some(field) = Field::from_encoding(encoding as u32) {
                    ensure_eq!(succeeds, access.vmx.caps.has_field(field), "VMREAD of {field:?}");
                }
            }
        }
    }
    for field in access.existing() {
        ensure!(u64::from(field.index()) <= highest_index(), "{field:?} has a higher index");
    }
    Ok(())
}

/// A value for `field` that no other field of this or of another set has.
fn unique(field: Field, set: u64) -> u64 {
    let number = field.slot() as u64 + 1 + 600 * set;
    (number << 48 | number << 24 | number) & kept_bits(field)
}

/// Writes a different value to each field but the read-only ones.
fn fill(caps: &Caps, set: u64) {
    for &(field, _) in FIELDS {
        if field.kind() != Kind::ReadOnly && caps.has_field(field) {
            vmcs::write(field, unique(field, set));
        }
    }
}

fn expect_filled(caps: &Caps, set: u64, what: &str) -> Verdict {
    for &(field, _) in FIELDS {
        if field.kind() != Kind::ReadOnly && caps.has_field(field) {
            let value = vmcs::read(field) & kept_bits(field);
            ensure_eq!(value, unique(field, set), "{field:?} {what}");
        }
    }
    Ok(())
}

/// No two fields are one.
fn distinct(ctx: &mut Ctx<'_>) -> Verdict {
    let access = Access::new(ctx)?;
    for set in 0..2 {
        fill(&access.vmx.caps, set);
        expect_filled(&access.vmx.caps, set, "after all others were written")?;
    }
    Ok(())
}

fn survive_vmclear(ctx: &mut Ctx<'_>) -> Verdict {
    let access = Access::new(ctx)?;
    for set in 0..3 {
        fill(&access.vmx.caps, set);
        for _ in 0..2 {
            ensure_eq!(vmx::vmclear(access.page), Ok(()), "VMCLEAR");
        }
        ensure_eq!(vmx::vmptrld(access.page), Ok(()), "VMPTRLD");
        expect_filled(&access.vmx.caps, set, "after VMCLEAR and VMPTRLD")?;
    }
    Ok(())
}

fn two_vmcs(ctx: &mut Ctx<'_>) -> Verdict {
    let access = Access::new(ctx)?;
    let caps = access.vmx.caps;
    let pages = [access.page, fresh(ctx, &access.vmx)?];
    for set in 0..4_u64 {
        let page = pages[set as usize % 2];
        ensure_eq!(vmx::vmptrld(page), Ok(()), "VMPTRLD");
        fill(&caps, set);
        if set > 0 {
            ensure_eq!(vmx::vmptrld(pages[(set as usize + 1) % 2]), Ok(()), "VMPTRLD");
            expect_filled(&caps, set - 1, "after another VMCS was written")?;
        }
    }
    Ok(())
}

/// One field of each width and kind.
const SAMPLE: [Field; 8] = [
    Field::GUEST_ES_SELECTOR,
    Field::HOST_CS_SELECTOR,
    Field::IO_BITMAP_A,
    Field::VMCS_LINK_POINTER,
    Field::EXCEPTION_BITMAP,
    Field::HOST_SYSENTER_CS,
    Field::GUEST_RIP,
    Field::HOST_RSP,
];

/// More VMCSs than anyone may have room for keep their values, cleared or not.
fn many_vmcs(ctx: &mut Ctx<'_>) -> Verdict {
    const MANY: usize = 100;
    let access = Access::new(ctx)?;
    let mut pages = [access.page; MANY];
    for page in pages.iter_mut().skip(1) {
        *page = fresh(ctx, &access.vmx)?;
    }
    for round in 0..3_u64 {
        for (index, &page) in pages.iter().enumerate() {
            let set = index as u64;
            ensure_eq!(vmx::vmptrld(page), Ok(()), "VMPTRLD of {index}, round {round}");
            for field in SAMPLE {
                if round > 0 {
                    let value = vmcs::read(field);
                    let expected = unique(field, set) ^ (round - 1);
                    ensure_eq!(value, expected, "{field:?} of VMCS {index}, round {round}");
                }
                vmcs::write(field, unique(field, set) ^ round);
            }
        }
        // Before the last round, half of them leave the processor.
        for &page in pages.iter().step_by(2).filter(|_| round == 1) {
            ensure_eq!(vmx::vmclear(page), Ok(()), "VMCLEAR");
        }
    }
    Ok(())
}
