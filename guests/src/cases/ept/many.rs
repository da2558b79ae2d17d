//! Answers: is everything still right when L1 has more EPTs, or tables in them, than an L0 has memory
//! to shadow?
//!
//! The architecture knows no limit: each VM entry may name another EPTP, and each EPT may have as many
//! tables as fit into memory (SDM Vol. 3C, "EPT Translation Mechanism").

use core::arch::x86_64::__cpuid;

use vmx_defs::Field;

use super::*;
use crate::{
    l2_code,
    vmx::{ept::TABLE, paging::USER_RW, vmcs},
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.many.roots", run: many_roots },
    Case { name: "ept.many.roots.edited", run: roots_edited },
    Case { name: "ept.many.tables", run: many_tables },
    Case { name: "ept.many.tables.edited", run: tables_edited },
];

l2_code! {
    /// For RCX up to RDI: the word number RCX modulo 512 at RBX + RCX * 2 MiB must be RCX + RSI.
    check:
        "2: mov rax, rcx", "and eax, 511", "mov rdx, rcx", "shl rdx, 21", "lea rdx, [rdx + rax * 8]",
        "mov rax, [rbx + rdx]", "sub rax, rsi", "cmp rax, rcx", "jne 3f", "inc rcx",
        "cmp rcx, rdi", "jb 2b", "3:";
}

/// Pages of numbers: word `n` of the page `n / 512` is `n` plus a start.
struct Numbers {
    pages: Page,
}

impl Numbers {
    /// For `count` numbers.
    fn new(ctx: &mut Ctx<'_>, count: usize, start: u64) -> Self {
        let pages = ctx.arena.page();
        for page in 0..count.div_ceil(512) {
            let at = ctx.arena.page();
            pages.write(page, at.address());
            for word in 0..512 {
                at.write(word, start + (page * 512 + word) as u64);
            }
        }
        Self { pages }
    }

    fn entry(&self, number: usize) -> u64 {
        self.pages.read(number / 512) | LEAF
    }
}

/// L2 and more EPTs than an L0 may want to shadow at once; each shows a number of its own in the first
/// page of the window.
pub struct Crowd {
    vm: Vm,
    /// Addresses of the EPT PML4 tables, 512 in a page, and of the page tables.
    roots: [Page; Crowd::COUNT / 512 + 1],
    leaves: [Page; Crowd::COUNT / 512 + 1],
    numbers: [Numbers; 2],
}

impl Crowd {
    /// How many there are.
    const COUNT: usize = 1200;

    /// Makes them.
    pub fn new(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Result<Self, Stop> {
        let vm = Vm::new(ctx, vmx, Mode::Long)?;
        let numbers = [0, 0x10_0000].map(|start| Numbers::new(ctx, Self::COUNT, start));
        let roots = core::array::from_fn(|_| ctx.arena.page());
        let leaves = core::array::from_fn(|_| ctx.arena.page());
        let crowd = Self { vm, roots, leaves, numbers };
        for number in 0..Self::COUNT {
            let ept = crowd.vm.ept.fork(ctx.arena);
            let entry = crowd.numbers[0].entry(number);
            let leaf = ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, entry);
            crowd.roots[number / 512].write(number % 512, ept.eptp(false));
            crowd.leaves[number / 512].write(number % 512, leaf.table.address());
        }
        Ok(crowd)
    }

    /// L2 reads through number `number`, which must show its number plus `start`.
    fn visit(&mut self, number: usize, start: u64) -> Verdict {
        vmcs::write(Field::EPT_POINTER, self.roots[number / 512].read(number % 512));
        let read = self.vm.load(WINDOW + (number % 512) as u64 * 8)?;
        ensure_eq!(read, start + number as u64, "what L2 reads through EPT {number}");
        Ok(())
    }

    /// L2 reads through each, and through old ones in between.
    pub fn visit_all(&mut self) -> Verdict {
        self.vm.make_current()?;
        for number in 0..Self::COUNT {
            self.visit(number, 0)?;
            if number % 16 == 15 {
                self.visit(number * 7 % (number + 1), 0)?;
            }
        }
        Ok(())
    }

    /// Changes the page of `number`.
    fn edit(&self, number: usize) {
        let table = Page::at(self.leaves[number / 512].read(number % 512));
        table.write(0, self.numbers[1].entry(number));
    }
}

fn many_roots(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut crowd = Crowd::new(ctx, &vmx)?;
    crowd.visit_all()?;
    // Backwards, so that the latest come first.
    for number in (0..Crowd::COUNT).rev().step_by(3) {
        crowd.visit(number, 0)?;
    }
    Ok(())
}

/// Changed after they were used: some invalidated one by one, the others together.
fn roots_edited(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    if !vmx.caps.ept.contains(EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL) {
        skip!("no INVEPT of all contexts");
    }
    let mut crowd = Crowd::new(ctx, &vmx)?;
    for number in 0..Crowd::COUNT {
        crowd.visit(number, 0)?;
        if number % 5 == 0 {
            let edited = number / 2;
            crowd.edit(edited);
            crate::vmx::invept_single(crowd.roots[edited / 512].read(edited % 512))?;
            crowd.visit(edited, 0x10_0000)?;
        }
    }
    for number in 0..Crowd::COUNT {
        crowd.edit(number);
    }
    // SAFETY: drops cached translations only.
    ensure_eq!(unsafe { vmx_hw::invept(2, [0; 2]) }, Ok(()), "INVEPT of all contexts");
    for number in (0..Crowd::COUNT).rev() {
        crowd.visit(number, 0x10_0000)?;
    }
    Ok(())
}

/// L2 and an EPT with more tables than an L0 may want to shadow at once: each maps one page of 2 MiB,
/// with a number of its own.
pub struct Tables {
    vm: Vm,
    /// Addresses of the page tables, 512 in a page: the page directories' entries.
    directories: [Page; Tables::COUNT / 512],
    numbers: [Numbers; 2],
}

impl Tables {
    /// How many there are: 32 MiB of them.
    const COUNT: usize = 8192;
    /// Where they begin in L2's guest-physical addresses.
    const GPA: u64 = 64 << 30;
    /// L2 sees its guest-physical addresses from here on.
    const LINEAR: u64 = 1 << 39;

    /// Makes them.
    pub fn new(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Result<Self, Stop> {
        if __cpuid(0x8000_0001).edx & 1 << 26 == 0 || vmx.caps.width < 38 {
            skip!("no 1-GiB pages, or physical addresses have fewer than 38 bits");
        }
        let vm = Vm::new(ctx, vmx, Mode::Long)?;
        let pointers = ctx.arena.page();
        for index in 0..512 {
            pointers.write(index, (index as u64) << 30 | 1 << 7 | USER_RW);
        }
        vm.paging.root.write(1, pointers.address() | USER_RW);
        let numbers = [0, 0x10_0000].map(|start| Numbers::new(ctx, Self::COUNT, start));
        let directories = core::array::from_fn(|number| {
            let gpa = L2Gpa::new(Self::GPA + ((number as u64) << 30));
            let directory = vm.ept.slot(ctx.arena, gpa, 2).table;
            for entry in 0..512 {
                let table = ctx.arena.page();
                table.write(0, numbers[0].entry(number * 512 + entry));
                directory.write(entry, table.address() | TABLE);
            }
            directory
        });
        Ok(Self { vm, directories, numbers })
    }

    fn read(&mut self, from: usize, to: usize, start: u64) -> Verdict {
        let registers = &mut self.vm.registers;
        registers.rbx = Self::LINEAR + Self::GPA;
        registers.rcx = from as u64;
        registers.rdi = to as u64;
        registers.rsi = start;
        self.vm.exec_at(check())?;
        ensure_eq!(self.vm.registers.rcx, to as u64, "how far L2 read the right numbers");
        Ok(())
    }

    /// L2 reads through the part number `part` of `parts`.
    pub fn read_part(&mut self, part: usize, parts: usize) -> Verdict {
        self.vm.make_current()?;
        self.read(part * Self::COUNT / parts, (part + 1) * Self::COUNT / parts, 0)
    }

    fn edit(&self, number: usize) {
        let table = Page::at(self.directories[number / 512].read(number % 512) & !0xFFF);
        table.write(0, self.numbers[1].entry(number));
    }
}

fn many_tables(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut tables = Tables::new(ctx, &vmx)?;
    tables.read(0, Tables::COUNT, 0)?;
    // The first ones again, which have waited longest, and the last.
    tables.read(0, 600, 0)?;
    tables.read(Tables::COUNT - 600, Tables::COUNT, 0)?;
    tables.read(Tables::COUNT / 2, Tables::COUNT / 2 + 600, 0)
}

fn tables_edited(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut tables = Tables::new(ctx, &vmx)?;
    let eptp = tables.vm.ept.eptp(false);
    tables.read(0, Tables::COUNT, 0)?;
    for number in 0..Tables::COUNT {
        tables.edit(number);
    }
    crate::vmx::invept_single(eptp)?;
    tables.read(0, Tables::COUNT, 0x10_0000)
}
