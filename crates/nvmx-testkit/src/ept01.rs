//! Where do L1's physical addresses lead in the machine?
//!
//! EPT01 stands in the host's memory, for the processor to walk; L0 and the engine walk it, too, to
//! translate an address. It covers the whole address space: RAM from where L0 put it, what L0 hides
//! by a page of ones that can only be read, and all else by addresses where nothing is.

use nvmx::host::L1Mapping;
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::ept::memory_type;
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{EptPermissions, Eptp, Hpa, L1Gpa};
use vmx_model::retention::Rng;
use vmx_model::{Memory, layout};

use crate::config::{Leaves, NestConfig};
use crate::frames;

const READ: u64 = 1;
const WRITE: u64 = 2;
const ALL: u64 = 7;
const LARGE: u64 = 1 << 7;
const WB: u64 = (memory_type::WB as u64) << 3;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_2M: u64 = 1 << 21;
const PAGE_1G: u64 = 1 << 30;

/// EPT01 of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Ept01 {
    root: u64,
    width: u8,
    /// The next frame for a table.
    next: u64,
}

/// Log2 of what an entry of a level covers.
const fn shift(level: u32) -> u32 {
    3 + 9 * level
}

impl Ept01 {
    /// Builds the tables.
    pub(crate) fn new(memory: &mut Memory, config: &NestConfig, width: u8) -> Self {
        let mut ept = Self { root: frames::EPT01, width, next: frames::EPT01 + PAGE_SIZE };
        let gigabytes = 1_u64 << (width - 30);
        let has_1g_pages = config.hardware.ept_vpid.contains(EptVpidCap::PAGE_1G);
        for number in 0..gigabytes {
            // L1's last gigabyte has no place behind the others.
            let here = number * PAGE_1G + frames::L1_RAM;
            let to = if number + 1 < gigabytes { here } else { frames::NOWHERE };
            if has_1g_pages {
                ept.map(memory, number * PAGE_1G, 3, to | ALL | WB);
            } else if number < 2 {
                for part in (0..PAGE_1G).step_by(PAGE_2M as usize) {
                    ept.map(memory, number * PAGE_1G + part, 2, (to + part) | ALL | WB);
                }
            } else {
                // Nothing is there, as in the second: one directory for all.
                let second = ept.entry(memory, PAGE_1G, 3);
                let at = ept.entry(memory, number * PAGE_1G, 3);
                memory.write_u64(at, memory.read_u64(second));
            }
        }
        ept.map_ram(memory, config.leaves);
        for page in &config.hidden {
            let ones = frames::ONES.as_u64();
            ept.map(memory, page.page().as_u64(), 1, ones | READ | WB);
        }
        ept
    }

    /// Maps L1's RAM by smaller pages.
    fn map_ram(&mut self, memory: &mut Memory, leaves: Leaves) {
        let size = layout::PAGES as u64 * PAGE_SIZE;
        let regions = size / PAGE_2M;
        let mut rng = Rng::new(if let Leaves::Scattered(seed) = leaves { seed } else { 0 });
        let places = match leaves {
            Leaves::Huge => return,
            Leaves::Large | Leaves::Small => (0..regions).collect(),
            Leaves::Scattered(_) => shuffled(&mut rng, regions),
        };
        for (region, place) in (0..).zip(places) {
            let (from, to) = (region * PAGE_2M, frames::L1_RAM + place * PAGE_2M);
            let small = match leaves {
                Leaves::Scattered(_) => rng.one_in(2),
                other => other == Leaves::Small,
            };
            if !small {
                self.map(memory, from, 2, to | ALL | WB);
                continue;
            }
            let pages = PAGE_2M / PAGE_SIZE;
            let order = match leaves {
                Leaves::Scattered(_) => shuffled(&mut rng, pages),
                _ => (0..pages).collect(),
            };
            for (page, place) in (0..).zip(order) {
                self.map(memory, from + page * PAGE_SIZE, 1, (to + place * PAGE_SIZE) | ALL | WB);
            }
        }
    }

    /// Puts a leaf of `level` there, in place of a part of a larger one or of smaller ones.
    fn map(&mut self, memory: &mut Memory, gpa: u64, level: u32, leaf: u64) {
        let at = self.entry(memory, gpa, level);
        let large = if level > 1 { LARGE } else { 0 };
        memory.write_u64(at, leaf | large);
    }

    /// The place of an entry of `level`. Tables above it are made where there are none, and larger
    /// pages split.
    fn entry(&mut self, memory: &mut Memory, gpa: u64, level: u32) -> Hpa {
        let mut table = self.root;
        for above in (level + 1..=4).rev() {
            let at = Hpa::new(table + (gpa >> shift(above) & 511) * 8);
            let entry = memory.read_u64(at);
            table = entry & ADDRESS;
            if entry == 0 || entry & LARGE != 0 {
                table = self.next;
                self.next += PAGE_SIZE;
                if entry != 0 {
                    self.split(memory, table, above - 1, entry);
                }
                memory.write_u64(at, table | ALL);
            }
        }
        Hpa::new(table + (gpa >> shift(level) & 511) * 8)
    }

    /// Maps a page of L1 there from now on.
    pub(crate) fn move_page(&mut self, memory: &mut Memory, page: L1Gpa, to: Hpa) {
        self.map(memory, page.page().as_u64(), 1, to.page().as_u64() | ALL | WB);
    }

    /// Changes where a page of L1 leads, and what may be done there.
    pub(crate) fn remap(
        &mut self,
        memory: &mut Memory,
        page: L1Gpa,
        to: Hpa,
        rights: EptPermissions,
    ) {
        let leaf = to.page().as_u64() | u64::from(rights.bits()) | WB;
        self.map(memory, page.page().as_u64(), 1, leaf);
    }

    /// Lets L1 write to a page of its RAM, or not.
    pub(crate) fn set_writable(&mut self, memory: &mut Memory, page: L1Gpa, writable: bool) {
        let place = self.translate(memory, page.page()).hpa.as_u64();
        let rights = if writable { ALL } else { ALL & !WRITE };
        self.map(memory, page.page().as_u64(), 1, place | rights | WB);
    }

    /// Fills a table of `level` with what one leaf above it maps.
    fn split(&self, memory: &mut Memory, table: u64, level: u32, leaf: u64) {
        let leaf = if level > 1 { leaf } else { leaf & !LARGE };
        for index in 0..512 {
            memory.write_u64(Hpa::new(table + index * 8), leaf + (index << shift(level)));
        }
    }

    /// The EPT pointer: write-back tables of four levels, without accessed and dirty flags.
    pub(crate) fn eptp(&self) -> Eptp {
        Eptp::from(self.root | 3 << 3 | u64::from(memory_type::WB))
    }

    /// Where an address of L1 leads.
    pub(crate) fn translate(&self, memory: &Memory, gpa: L1Gpa) -> L1Mapping {
        let address = gpa.as_u64();
        let mut table = if gpa.fits(self.width) { self.root } else { 0 };
        for level in (1..=4).rev() {
            if table == 0 {
                break;
            }
            let entry = memory.read_u64(Hpa::new(table + (address >> shift(level) & 511) * 8));
            if level == 1 || entry & LARGE != 0 {
                let mask = (1 << shift(level)) - 1;
                return L1Mapping {
                    hpa: Hpa::new(entry & ADDRESS & !mask | address & mask),
                    permissions: EptPermissions::from_bits_truncate((entry & ALL) as u8),
                    memory_type: (entry >> 3 & 7) as u8,
                    size_shift: shift(level) as u8,
                };
            }
            table = entry & ADDRESS;
        }
        L1Mapping {
            hpa: Hpa::new(frames::ONES.as_u64() | gpa.page_offset()),
            permissions: EptPermissions::READ,
            memory_type: memory_type::WB,
            size_shift: 12,
        }
    }
}

/// The numbers below `count` in another order.
fn shuffled(rng: &mut Rng, count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    for end in (1..numbers.len()).rev() {
        numbers.swap(end, rng.below(end as u64 + 1) as usize);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn built(config: &NestConfig) -> (Memory, Ept01) {
        let mut memory = Memory::new(frames::PAGES);
        let ept = Ept01::new(&mut memory, config, 40);
        (memory, ept)
    }

    #[test]
    fn every_page_of_ram_has_one_of_the_machine() {
        let scattered = (0..8).map(Leaves::Scattered);
        for leaves in [Leaves::Huge, Leaves::Large, Leaves::Small].into_iter().chain(scattered) {
            let config = NestConfig { leaves, ..NestConfig::default() };
            let (memory, ept) = built(&config);
            let pages: BTreeSet<_> = (0..layout::PAGES as u64)
                .map(|page| {
                    let mapping = ept.translate(&memory, L1Gpa::new(page << 12 | 0x123));
                    assert_eq!(mapping.permissions.bits(), 7);
                    assert_eq!(mapping.hpa.page_offset(), 0x123);
                    mapping.hpa.page().as_u64()
                })
                .collect();
            assert_eq!(pages.len(), layout::PAGES, "{leaves:?}");
            assert_eq!(pages.first(), Some(&frames::L1_RAM));
            let last = frames::L1_RAM + ((layout::PAGES as u64 - 1) << 12);
            assert_eq!(pages.last(), Some(&last));
        }
    }

    #[test]
    fn without_gigabyte_pages_it_leads_to_the_same_places() {
        let mut config = NestConfig::default();
        config.hardware.ept_vpid.remove(EptVpidCap::PAGE_1G);
        let ((memory, with), (other, without)) = (built(&NestConfig::default()), built(&config));
        for gpa in [0, 0x12_3456, 0x3fff_ffff, 0x4000_0000, 0x7fff_f000] {
            let gpa = L1Gpa::new(gpa);
            let mapping = without.translate(&other, gpa);
            assert_eq!(mapping.hpa, with.translate(&memory, gpa).hpa);
            assert_eq!(mapping.size_shift, 21);
        }
        let far = without.translate(&other, L1Gpa::new((1 << 40) - 8));
        assert!(far.hpa.as_u64() > frames::NOWHERE);
    }

    #[test]
    fn what_is_hidden_reads_as_ones_and_its_neighbours_do_not() {
        let hidden = L1Gpa::new(0x3f_f000);
        let config = NestConfig { hidden: vec![hidden], ..NestConfig::default() };
        let (memory, ept) = built(&config);
        let mapping = ept.translate(&memory, hidden);
        assert_eq!((mapping.hpa, mapping.permissions), (frames::ONES, EptPermissions::READ));
        for near in [0x3f_e000, 0x40_0000] {
            let mapping = ept.translate(&memory, L1Gpa::new(near));
            assert_eq!(mapping.hpa.as_u64(), frames::L1_RAM + near);
        }
        assert_eq!(ept.translate(&memory, L1Gpa::new(1 << 40)).hpa, frames::ONES);
        let last = ept.translate(&memory, L1Gpa::new((1 << 40) - 8));
        assert!(last.hpa.as_u64() > frames::NOWHERE);
    }
}
