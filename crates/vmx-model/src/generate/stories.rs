//! Which sequences of steps would single random ones hardly ever come to?
//!
//! Each story is about one rule that needs several steps in their order to be seen at all. What may
//! stand between them, and what they are told of, is random as everywhere.

use vmx_defs::Field;
use vmx_defs::event::IntrInfo;

use super::{Changed, Generator, load};
use crate::layout::{self, DATA, DATA_PAGES, EPT_LEAF, VIEWS, guest};
use crate::operation::Operation;
use crate::program::{Action, GuestMode};

/// The event types of VM-entry interruption information.
mod kind {
    pub(super) const EXTERNAL: u64 = 0;
    pub(super) const NMI: u64 = 2;
    pub(super) const EXCEPTION: u64 = 3;
    pub(super) const SOFTWARE: u64 = 4;
}

impl Generator<'_> {
    /// One of the stories.
    pub(super) fn story(&mut self, processor: usize) {
        let mode = self.vm(processor).mode;
        match self.rng.below(5) {
            0 | 1 if mode == GuestMode::Pae => self.pdptes(processor),
            0 => self.disabled_function(processor),
            1 => self.injection(processor),
            // Whether the guest's own tables lead to the page, no one knows: if they do not, stale
            // mappings are used.
            2 | 3 if !self.is_exact() || mode == GuestMode::Unpaged => self.denied_page(processor),
            _ => self.shared_table(processor),
        }
    }

    fn some_page(&mut self) -> u64 {
        DATA + self.rng.below(DATA_PAGES)
    }

    /// L1 takes EPTP switching away for a while.
    fn disabled_function(&mut self, processor: usize) {
        self.push(processor, Action::SetField(Field::VM_FUNCTION_CONTROLS, 0));
        let rcx = self.list_index();
        self.push(processor, Action::Guest(Operation::Vmfunc { rax: 0, rcx }));
        let at = self.address();
        self.push(processor, Action::Guest(load(at)));
        self.push(processor, Action::SetField(Field::VM_FUNCTION_CONTROLS, 1));
    }

    /// The PDPTEs that the guest uses are those of its registers, or of its memory.
    fn pdptes(&mut self, processor: usize) {
        let [first, second] = [0, 1].map(|number| layout::guest_cr3(GuestMode::Pae)[number]);
        let at = self.address();
        if self.vm(processor).view.is_some() {
            // They are loaded by neither a switch nor a VM entry.
            let table = layout::guest_structure(guest::PAE);
            let pdpte = (guest::PAE + 1) << 12 | 1;
            self.push(processor, Action::Guest(load(at)));
            self.push(processor, Action::Write { at: table, value: 0 });
            let rcx = self.list_index();
            self.push(processor, Action::Guest(Operation::Vmfunc { rax: 0, rcx }));
            self.push(processor, Action::Guest(load(at)));
            self.push(processor, Action::Write { at: table, value: pdpte });
        } else {
            // A VM entry loads them from where CR3 points to.
            for value in [second, first] {
                let operation = Operation::MovToCr { register: 3, value };
                self.push(processor, Action::Guest(operation));
                self.after_change(processor, Changed::Guest);
                self.push(processor, Action::Leave);
                self.push(processor, Action::Guest(load(at)));
            }
        }
    }

    /// L1 injects an event, perhaps into a view that its guest has never used.
    fn injection(&mut self, processor: usize) {
        if self.rng.one_in(2) {
            let view = self.rng.below(VIEWS as u64) as usize;
            let eptp = layout::eptp(view, self.setup.accessed_dirty[view]);
            self.push(processor, Action::SetField(Field::EPT_POINTER, eptp));
        }
        let (kind, vector, has_code) = match self.rng.below(5) {
            0 => (kind::EXTERNAL, 0x40, false),
            1 => (kind::NMI, 2, false),
            2 => (kind::EXCEPTION, 6, false),
            3 => (kind::EXCEPTION, 13, true),
            _ => (kind::SOFTWARE, 0x80, false),
        };
        let valid = u64::from(u32::from(IntrInfo::new().with_valid(true)));
        let information = valid | u64::from(has_code) << 11 | kind << 8 | vector;
        if kind == kind::EXTERNAL {
            self.push(processor, Action::SetField(Field::GUEST_RFLAGS, 0x202));
        }
        self.push(processor, Action::SetField(Field::ENTRY_EXCEPTION_ERROR, 0));
        self.push(processor, Action::SetField(Field::ENTRY_INSTRUCTION_LEN, 2));
        self.push(processor, Action::SetField(Field::ENTRY_INTR_INFO, information));
        self.push(processor, Action::Enter);
    }

    /// Two views share a page table. What one has cached of it, the other has not: after INVEPT of
    /// the one, no more is due for what only that one has used.
    fn shared_table(&mut self, processor: usize) {
        let (page, other) = (self.some_page(), self.some_page());
        let at = layout::ept_table(0, 1) + 8 * page;
        let (mut one, mut two) = (0, 3);
        if self.rng.one_in(2) {
            std::mem::swap(&mut one, &mut two);
        }
        let eptp =
            |generator: &Self, view| layout::eptp(view, generator.setup.accessed_dirty[view]);
        let enter = |generator: &mut Self, view| {
            let eptp = eptp(generator, view);
            generator.push(processor, Action::SetField(Field::EPT_POINTER, eptp));
        };
        let read = |page: u64| Action::Guest(load(page << 12));
        let leaf = |generator: &mut Self| {
            let view = generator.rng.below(VIEWS as u64) as usize;
            let frame = layout::guest_data(view, generator.rng.below(DATA_PAGES));
            Action::Write { at, value: frame | EPT_LEAF | 3 << 8 }
        };
        // Not there at all, for anyone.
        self.push(processor, Action::Write { at, value: 0 });
        self.after_change(processor, Changed::Ept);
        for view in [one, two] {
            enter(self, view);
            self.push(processor, read(other));
        }
        enter(self, one);
        let entry = leaf(self);
        self.push(processor, entry);
        self.push(processor, read(page));
        let entry = leaf(self);
        self.push(processor, entry);
        let due = Action::Invept { kind: 1, eptp: eptp(self, one) };
        if self.rng.one_in(2) {
            self.push(processor, due);
        }
        enter(self, two);
        self.push(processor, read(page));
        // Another processor may run one of them.
        self.push(processor, due);
        self.after_change(processor, Changed::Ept);
    }

    /// L1 denies a page, is told of an access, and puts another one in its place, without INVEPT: the
    /// violation has made the processor forget the page, under every EPTP with this EP4TA.
    fn denied_page(&mut self, processor: usize) {
        let view = self.rng.below(VIEWS as u64) as usize;
        let page = self.some_page();
        let at = layout::ept_table(view, 1) + 8 * page;
        let (read, flags) = (Action::Guest(load(page << 12)), self.setup.accessed_dirty[view]);
        let enter = |generator: &mut Self, flags| {
            let eptp = layout::eptp(view, flags);
            generator.push(processor, Action::SetField(Field::EPT_POINTER, eptp));
        };
        let frame = layout::guest_data(view, self.rng.below(DATA_PAGES));
        enter(self, flags);
        self.push(processor, Action::Write { at, value: frame | EPT_LEAF & !2 | 3 << 8 });
        self.push(processor, Action::Invept { kind: 2, eptp: 0 });
        self.push(processor, read);
        // What was cached without accessed flags is used with them, too.
        let sibling = (flags || !self.is_exact()) && self.rng.one_in(2);
        if sibling {
            enter(self, !flags);
            self.push(processor, read);
        }
        let store = Operation::Store { at: page << 12, size: 8, value: self.rng.next() };
        self.push(processor, Action::Guest(store));
        let other = self.rng.below(VIEWS as u64) as usize;
        let frame = layout::guest_data(other, self.rng.below(DATA_PAGES));
        let rights = if self.rng.one_in(2) { 0 } else { 2 };
        self.push(processor, Action::Write { at, value: frame | EPT_LEAF & !rights | 3 << 8 });
        if sibling && self.rng.one_in(2) {
            enter(self, flags);
        }
        self.push(processor, read);
        if self.is_exact() {
            enter(self, flags);
            self.after_change(processor, Changed::Ept);
        }
    }
}
