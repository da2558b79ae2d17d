//! Where is physical memory, seen from L0? At a fixed distance: the *direct map*. This file has its
//! address arithmetic, ranges of physical memory, and the maps of RAM that both sides of L0 use.

use arrayvec::ArrayVec;

/// Virtual address of physical address 0, in the boot tables and in the final ones.
pub(crate) const DIRECT_MAP: u64 = 0xFFFF_8000_0000_0000;
/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of a 2M page.
pub(crate) const PAGE_2M: u64 = 2 << 20;
/// Bytes of a 1G page.
pub(crate) const PAGE_1G: u64 = 1 << 30;
/// Most areas of a memory map that are kept.
pub(crate) const MAX_AREAS: usize = 128;

/// The virtual address at which L0 sees physical address `physical`.
pub(crate) fn direct<T>(physical: u64) -> *mut T {
    (DIRECT_MAP + physical) as *mut T
}

/// A range of physical addresses, `end` not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Span {
    /// First byte.
    pub(crate) start: u64,
    /// The byte behind the last.
    pub(crate) end: u64,
}

impl Span {
    /// `len` bytes at `start`; `None` if that runs past the last 64-bit address.
    pub(crate) fn sized(start: u64, len: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(len)? })
    }

    /// Number of bytes.
    pub(crate) fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has no byte.
    pub(crate) fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Whether both have a byte in common.
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `other` lies within.
    pub(crate) fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// What a memory map says of an area: the numbers of the BIOS's E820 map, which multiboot uses too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// Where.
    pub(crate) span: Span,
    /// 1 is usable RAM, 3 ACPI tables, 4 ACPI storage, 5 defective; all else is reserved.
    pub(crate) kind: u32,
}

/// Usable RAM.
pub(crate) const AREA_RAM: u32 = 1;
/// Reserved.
pub(crate) const AREA_RESERVED: u32 = 2;

/// A memory map.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryMap {
    areas: ArrayVec<Area, MAX_AREAS>,
}

impl MemoryMap {
    /// Adds an area; an empty one, or one past the capacity, is dropped (L1 then has less RAM).
    pub(crate) fn push(&mut self, area: Area) {
        if !area.span.is_empty() {
            let _ = self.areas.try_push(area);
        }
    }

    /// All areas, in the loader's order.
    pub(crate) fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// The areas of usable RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Span> + '_ {
        self.areas.iter().filter(|area| area.kind == AREA_RAM).map(|area| area.span)
    }

    /// The address behind the last byte of RAM, ACPI tables included.
    pub(crate) fn end_of_ram(&self) -> u64 {
        self.areas
            .iter()
            .filter(|area| matches!(area.kind, AREA_RAM | 3 | 4))
            .map(|area| area.span.end)
            .max()
            .unwrap_or(0)
    }

    /// The highest `align`ed place for `len` bytes of RAM, below `limit`, clear of all of `avoid`.
    pub(crate) fn highest_place(
        &self,
        len: u64,
        align: u64,
        limit: u64,
        avoid: &[Span],
    ) -> Option<Span> {
        self.ram()
            .filter_map(|ram| {
                let mut top = ram.end.min(limit);
                // Each round moves below one more obstacle, so that it ends.
                loop {
                    let start = top.checked_sub(len)? & !(align - 1);
                    let place = Span::sized(start, len)?;
                    if start < ram.start {
                        return None;
                    }
                    match avoid.iter().filter(|span| span.overlaps(place)).map(|s| s.start).min() {
                        Some(obstacle) => top = obstacle,
                        None => return Some(place),
                    }
                }
            })
            .max_by_key(|place| place.start)
    }

    /// The lowest page-aligned place for `len` bytes of RAM at or above `floor` and below `limit`,
    /// clear of all of `avoid`.
    pub(crate) fn lowest_place(
        &self,
        len: u64,
        floor: u64,
        limit: u64,
        avoid: &[Span],
    ) -> Option<Span> {
        self.ram()
            .filter_map(|ram| {
                let mut start = ram.start.max(floor).checked_next_multiple_of(PAGE)?;
                loop {
                    let place = Span::sized(start, len)?;
                    if place.end > ram.end.min(limit) {
                        return None;
                    }
                    match avoid.iter().filter(|span| span.overlaps(place)).map(|s| s.end).max() {
                        Some(obstacle) => start = obstacle.checked_next_multiple_of(PAGE)?,
                        None => return Some(place),
                    }
                }
            })
            .min_by_key(|place| place.start)
    }

    /// The map that L1 is shown: `taken` and the rest of its RAM area above it are reserved.
    pub(crate) fn without(&self, taken: Span) -> Self {
        let mut map = Self::default();
        for &Area { span, kind } in &self.areas {
            if kind == AREA_RAM && span.overlaps(taken) {
                map.push(Area { span: Span { start: span.start, end: taken.start }, kind });
                map.push(Area {
                    span: Span { start: taken.start, end: span.end },
                    kind: AREA_RESERVED,
                });
            } else {
                map.push(Area { span, kind });
            }
        }
        map
    }
}

/// Copies `from` to physical address `to`, which may overlap.
///
/// # Safety
/// Both ranges are RAM within the direct map, and no Rust object lives in `to`.
pub(crate) unsafe fn copy_physical(from: Span, to: u64) {
    // SAFETY: as the caller promises.
    unsafe { core::ptr::copy(direct::<u8>(from.start), direct::<u8>(to), from.len() as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn map(areas: &[(u64, u64, u32)]) -> MemoryMap {
        let mut map = MemoryMap::default();
        for &(start, end, kind) in areas {
            map.push(Area { span: Span { start, end }, kind });
        }
        map
    }

    #[test]
    fn the_highest_place_is_aligned_below_the_limit_and_clear_of_obstacles() {
        let map = map(&[(0, MIB, 1), (MIB, 100 * MIB, 1), (4096 * MIB, 8192 * MIB, 1)]);
        let place = |avoid: &[Span]| map.highest_place(16 * MIB, PAGE_2M, 1 << 32, avoid);
        assert_eq!(place(&[]), Span::sized(84 * MIB, 16 * MIB));
        let obstacle = Span { start: 90 * MIB, end: 91 * MIB };
        assert_eq!(place(&[obstacle]), Span::sized(74 * MIB, 16 * MIB));
        let wall = Span { start: 10 * MIB, end: 100 * MIB };
        assert_eq!(place(&[wall]), None);
        assert_eq!(map.highest_place(200 * MIB, PAGE, 1 << 32, &[]), None);
    }

    #[test]
    fn the_lowest_place_moves_over_obstacles_into_the_next_area() {
        let map = map(&[(MIB, 4 * MIB, 1), (8 * MIB, 16 * MIB, 1)]);
        let place = |floor, avoid: &[Span]| map.lowest_place(2 * MIB, floor, 1 << 32, avoid);
        assert_eq!(place(MIB + 5, &[]), Span::sized(MIB + PAGE, 2 * MIB));
        let obstacle = Span { start: MIB, end: 2 * MIB + 1 };
        assert_eq!(place(0, &[obstacle]), Span::sized(8 * MIB, 2 * MIB));
        assert_eq!(map.lowest_place(2 * MIB, 0, 3 * MIB, &[]), Span::sized(MIB, 2 * MIB));
        assert_eq!(map.lowest_place(2 * MIB, 0, 2 * MIB, &[]), None);
    }

    #[test]
    fn what_is_taken_is_reserved_up_to_the_end_of_its_area() {
        let taken = Span { start: 64 * MIB, end: 96 * MIB };
        let shown = map(&[(MIB, 100 * MIB, 1), (100 * MIB, 101 * MIB, 3)]).without(taken);
        assert_eq!(
            shown.ram().collect::<alloc::vec::Vec<_>>(),
            [Span { start: MIB, end: 64 * MIB }]
        );
        assert_eq!(shown.areas()[1].span, Span { start: 64 * MIB, end: 100 * MIB });
        assert_eq!(shown.areas()[1].kind, AREA_RESERVED);
        assert_eq!(shown.end_of_ram(), 101 * MIB);
    }
}
