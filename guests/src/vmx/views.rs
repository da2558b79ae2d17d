//! Answers: how are many EPT views of one guest-physical page made, for VMFUNC to switch between?

use vmx_defs::L2Gpa;

use super::{
    Ept,
    ept::{LEAF, Slot},
    paging::WINDOW,
};
use crate::{memory::Page, suite::Ctx};

/// EPT hierarchies that differ in what the first page of the [`WINDOW`] is. They share the tables
/// for the first GiB, as the views of a real hypervisor share most of theirs.
#[derive(Clone, Copy)]
pub struct Views {
    /// The EPTP list, filled from entry 0 on; the entries after the last view are 0.
    pub list: Page,
    /// How many there are.
    pub count: usize,
    leaves: Page,
    data: Page,
}

impl Views {
    /// Makes `count` views, at most 512, over `base`; `ad` says which have accessed and dirty flags
    /// enabled. Each view's page begins with its [`value`](Self::value).
    pub fn new(ctx: &mut Ctx<'_>, base: &Ept, count: usize, ad: impl Fn(usize) -> bool) -> Self {
        let views = Self {
            list: ctx.arena.page(),
            count,
            leaves: ctx.arena.page(),
            data: ctx.arena.page(),
        };
        for index in 0..count {
            let data = ctx.arena.page();
            data.write(0, Self::value(index));
            let ept = base.fork(ctx.arena);
            let leaf = ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, data.address() | LEAF);
            views.list.write(index, ept.eptp(ad(index)));
            views.leaves.write(index, leaf.table.address());
            views.data.write(index, data.address());
        }
        views
    }

    /// What the page of view `index` begins with; it fits in 32 bits.
    pub fn value(index: usize) -> u64 {
        0x5EED_0000 + index as u64
    }

    /// The EPTP of view `index`, as the list has it at first.
    pub fn eptp(&self, index: usize) -> u64 {
        self.list.read(index)
    }

    /// The EPT of view `index`.
    pub fn ept(&self, index: usize) -> Ept {
        Ept { root: Page::at(self.eptp(index) & 0xF_FFFF_FFFF_F000) }
    }

    /// The page of view `index`.
    pub fn data(&self, index: usize) -> Page {
        Page::at(self.data.read(index))
    }

    /// The entry that maps the page of view `index`; the entries after it map the rest of the
    /// window.
    pub fn leaf(&self, index: usize) -> Slot {
        Slot { table: Page::at(self.leaves.read(index)), index: 0 }
    }
}
