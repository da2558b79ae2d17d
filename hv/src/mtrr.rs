//! Which memory type has a physical address by the MTRRs?
//!
//! EPT01's leaves carry the types that L1 would have on the bare machine, since with EPT the MTRRs
//! have no say in a guest (SDM "Memory Type Range Registers (MTRRs)").

use arrayvec::ArrayVec;
use vmx_defs::ept::memory_type::{UC, WB, WT};

use crate::msr;
use crate::phys::Span;

/// IA32_MTRRCAP.
pub(crate) const CAPABILITIES: u32 = 0xFE;
const FIRST_VARIABLE: u32 = 0x200;
const DEFAULT_TYPE: u32 = 0x2FF;
/// The fixed-range registers, the start of what each covers, and the bytes of each of its 8 ranges.
const FIXED: [(u32, u64, u64); 11] = [
    (0x250, 0x00000, 0x10000),
    (0x258, 0x80000, 0x4000),
    (0x259, 0xA0000, 0x4000),
    (0x268, 0xC0000, 0x1000),
    (0x269, 0xC8000, 0x1000),
    (0x26A, 0xD0000, 0x1000),
    (0x26B, 0xD8000, 0x1000),
    (0x26C, 0xE0000, 0x1000),
    (0x26D, 0xE8000, 0x1000),
    (0x26E, 0xF0000, 0x1000),
    (0x26F, 0xF8000, 0x1000),
];
/// Most variable ranges that are read: the count field could say 255, processors have 10 or so.
const MAX_VARIABLE: u32 = 32;
/// What the fixed ranges cover.
const FIXED_SPAN: Span = Span { start: 0, end: 1 << 20 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variable {
    base: u64,
    mask: u64,
    kind: u8,
}

/// A copy of the MTRRs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mtrrs {
    enabled: bool,
    default: u8,
    fixed: Option<[u64; FIXED.len()]>,
    variable: ArrayVec<Variable, { MAX_VARIABLE as usize }>,
}

/// Whether `index` is an MTRR that changes memory types when it is written.
pub(crate) fn is_mtrr(index: u32) -> bool {
    (FIRST_VARIABLE..FIRST_VARIABLE + 2 * variable_count()).contains(&index)
        || index == DEFAULT_TYPE
        || FIXED.iter().any(|(register, ..)| *register == index)
}

fn variable_count() -> u32 {
    (msr::try_read(CAPABILITIES).unwrap_or(0) as u32 & 0xFF).min(MAX_VARIABLE)
}

impl Mtrrs {
    /// Reads this processor's MTRRs. `width` is the physical-address width in bits.
    pub(crate) fn read(width: u8) -> Self {
        let capabilities = msr::try_read(CAPABILITIES).unwrap_or(0);
        // Without MTRRs everything is write-back as far as they are concerned.
        let default = msr::try_read(DEFAULT_TYPE).unwrap_or(1 << 11 | u64::from(WB));
        let fixed = (capabilities & 1 << 8 != 0 && default & 1 << 10 != 0)
            .then(|| FIXED.map(|(register, ..)| msr::try_read(register).unwrap_or(0)));
        let mut variable = ArrayVec::new();
        let address = ((1_u64 << width) - 1) & !0xFFF;
        for n in 0..variable_count() {
            let base = msr::try_read(FIRST_VARIABLE + 2 * n).unwrap_or(0);
            let mask = msr::try_read(FIRST_VARIABLE + 2 * n + 1).unwrap_or(0);
            if mask & 1 << 11 != 0 {
                variable.push(Variable {
                    base: base & mask & address,
                    mask: mask & address,
                    kind: base as u8,
                });
            }
        }
        Self { enabled: default & 1 << 11 != 0, default: default as u8, fixed, variable }
    }

    /// The type of all of `span` (whose size is a power of two that it is aligned to), or `None` if
    /// it has several.
    pub(crate) fn kind_of(&self, span: Span) -> Option<u8> {
        if !self.enabled {
            return Some(UC);
        }
        if let Some(fixed) = &self.fixed
            && FIXED_SPAN.overlaps(span)
        {
            return if FIXED_SPAN.contains(span) { Self::fixed_kind(fixed, span) } else { None };
        }
        let size_mask = !(span.len() - 1);
        let mut kind = None;
        for range in &self.variable {
            // Address bits that the mask compares below the span's size split it.
            if span.start & range.mask & size_mask != range.base & size_mask {
                continue;
            }
            if range.mask & !size_mask & !0xFFF != 0 {
                return None;
            }
            // SDM "MTRR Precedences": uncacheable wins, write-through wins over write-back; the
            // rest is undefined, and we take the one that is always safe.
            kind = Some(match (kind, range.kind) {
                (None, new) => new,
                (Some(old), new) if old == new => old,
                (Some(WT), WB) | (Some(WB), WT) => WT,
                _ => UC,
            });
        }
        Some(kind.unwrap_or(self.default))
    }

    /// The type of `span`, which lies below 1 MiB.
    fn fixed_kind(values: &[u64; FIXED.len()], span: Span) -> Option<u8> {
        let mut found = None;
        for ((_, start, step), value) in FIXED.iter().zip(values) {
            for (n, kind) in value.to_le_bytes().into_iter().enumerate() {
                let part = start + step * n as u64;
                if span.overlaps(Span { start: part, end: part + step }) {
                    if found.is_some_and(|found| found != kind) {
                        return None;
                    }
                    found = Some(kind);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn mtrrs(variable: &[(u64, u64, u8)]) -> Mtrrs {
        let width_mask = (1 << 40) - 1;
        Mtrrs {
            enabled: true,
            default: WB,
            fixed: None,
            variable: variable
                .iter()
                .map(|&(base, len, kind)| Variable { base, mask: width_mask & !(len - 1), kind })
                .collect(),
        }
    }

    fn kind(mtrrs: &Mtrrs, start: u64, len: u64) -> Option<u8> {
        mtrrs.kind_of(Span { start, end: start + len })
    }

    #[test]
    fn a_border_within_the_span_gives_no_type() {
        let mtrrs = mtrrs(&[(3 * GIB, GIB, UC), (GIB + 2 * MIB, 2 * MIB, WT)]);
        assert_eq!(kind(&mtrrs, 0, GIB), Some(WB));
        assert_eq!(kind(&mtrrs, GIB, GIB), None);
        assert_eq!(kind(&mtrrs, GIB, 2 * MIB), Some(WB));
        assert_eq!(kind(&mtrrs, GIB + 2 * MIB, 2 * MIB), Some(WT));
        assert_eq!(kind(&mtrrs, GIB + 3 * MIB, 4096), Some(WT));
        assert_eq!(kind(&mtrrs, 3 * GIB, GIB), Some(UC));
        assert_eq!(kind(&mtrrs, 4 * GIB, GIB), Some(WB));
    }

    #[test]
    fn overlapping_ranges_have_the_precedence_of_the_sdm() {
        for (first, second, wanted) in
            [(WB, UC, UC), (UC, WT, UC), (WB, WT, WT), (WT, WB, WT), (WB, WB, WB)]
        {
            let mtrrs = mtrrs(&[(GIB, GIB, first), (GIB, GIB, second)]);
            assert_eq!(kind(&mtrrs, GIB, 4096), Some(wanted), "{first} and {second}");
        }
    }

    #[test]
    fn fixed_ranges_rule_the_first_mebibyte_and_disabled_mtrrs_all() {
        let mut values = [0x0606_0606_0606_0606; FIXED.len()];
        values[2] = 0;
        let mut mtrrs = Mtrrs { fixed: Some(values), ..mtrrs(&[]) };
        assert_eq!(kind(&mtrrs, 0, 0x1000), Some(WB));
        assert_eq!(kind(&mtrrs, 0xA_0000, 0x1000), Some(UC));
        assert_eq!(kind(&mtrrs, 0x8_0000, 0x4_0000), None);
        assert_eq!(kind(&mtrrs, 0, 2 * MIB), None);
        assert_eq!(kind(&mtrrs, 2 * MIB, 2 * MIB), Some(WB));
        mtrrs.enabled = false;
        assert_eq!(kind(&mtrrs, 0, 2 * MIB), Some(UC));
    }
}
