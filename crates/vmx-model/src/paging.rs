//! Where does a linear address lead, and may it be accessed like this?
//!
//! SDM Vol. 3A, chapter "Paging": no paging, 32-bit, PAE with its PDPTE registers, and 4-level
//! paging, each under EPT or not; and the use of the linear and combined mappings that are cached
//! (Vol. 3C, "Using Cached Translation Information"). An access that ends in a fault, or in an EPT
//! violation of the page itself, sets no accessed or dirty flag of guest paging; the architecture
//! leaves that open.

use vmx_defs::event::vector;
use vmx_defs::{EptPermissions, Gva, Hpa};

use crate::addr::{Gpa, is_canonical};
use crate::caches::{Space, Structure, Translation};
use crate::caps::LINEAR_WIDTH;
use crate::ept::{PagingRights, Purpose};
use crate::memory::Memory;
use crate::processor::Processor;
use crate::registers::{cr0, cr4, efer, rflags};
use crate::stop::{Exception, Flow, Stop, fault};

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
}

/// An access to a linear address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Access {
    pub(crate) kind: Kind,
    /// A user-mode access (CPL 3), else a supervisor-mode one.
    pub(crate) user: bool,
    /// An implicit supervisor-mode access, to a descriptor table or the TSS.
    pub(crate) implicit: bool,
}

impl Access {
    /// An implicit supervisor-mode read.
    pub(crate) const SYSTEM_READ: Self = Self { kind: Kind::Read, user: false, implicit: true };
    /// A supervisor-mode write, whatever the CPL was: event delivery's pushes.
    pub(crate) const PUSH: Self = Self { kind: Kind::Write, user: false, implicit: false };

    /// The rights that EPT has to give.
    #[inline]
    fn wanted(self) -> EptPermissions {
        match self.kind {
            Kind::Read => EptPermissions::READ,
            Kind::Write => EptPermissions::WRITE,
            Kind::Fetch => EptPermissions::EXECUTE,
        }
    }
}

/// Bits of page-table entries, the same in all formats.
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const PAGE_SIZE: u64 = 1 << 7;
    pub(super) const GLOBAL: u64 = 1 << 8;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    pub(super) const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a page fault's error code (SDM Vol. 3A, "Page-Fault Exceptions").
mod code {
    pub(super) const PRESENT: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
}

/// Whether a PDPTE may be loaded into its register: not present, or no reserved bit set (SDM Vol.
/// 3A, "PDPTE Registers").
pub(crate) const fn is_valid_pdpte(pdpte: u64, physical_width: u8) -> bool {
    pdpte & entry::PRESENT == 0 || pdpte & 0x1e6 == 0 && pdpte >> physical_width == 0
}

/// The formats of paging structures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Bits32,
    Pae,
    FourLevel,
}

/// An entry used on a walk.
#[derive(Clone, Copy, Default)]
struct Used {
    /// Its guest-physical address.
    gpa: Gpa,
    /// Where it is.
    at: Hpa,
    value: u64,
    /// Log2 of the bytes it covers.
    shift: u8,
    /// It is a cached value, whose flags are not set any more.
    stale: bool,
}

/// Where paging ends.
struct Walked {
    /// The entries that were used, from the top.
    used: [Used; 4],
    count: usize,
    /// Size of an entry in bytes.
    size: u8,
    /// The rights that a cached table began with: R/W, U/S, XD.
    began: (bool, bool, bool),
    gpa: Gpa,
    shift: u8,
    writable: bool,
    user: bool,
    no_execute: bool,
    global: bool,
    dirty: bool,
}

impl Walked {
    /// The flags that the access sets in each entry used: accessed, and dirty in the last one.
    fn flags(&self, index: usize, write: bool) -> u64 {
        let dirty = if write && index + 1 == self.count { entry::DIRTY } else { 0 };
        entry::ACCESSED | dirty
    }
}

impl Processor {
    /// An explicit access of the software that runs.
    #[inline]
    pub(crate) fn access(&self, kind: Kind) -> Access {
        Access { kind, user: self.regs.cpl() == 3, implicit: false }
    }

    /// A linear address as the mode takes it: canonical in 64-bit mode, of 32 bits elsewhere.
    #[inline]
    pub(crate) fn linear(&self, address: u64) -> Flow<Gva> {
        if self.regs.is_64bit() {
            if !is_canonical(address, LINEAR_WIDTH) {
                return fault(Exception::GP);
            }
            Ok(Gva::new(address))
        } else {
            Ok(Gva::new(address & 0xffff_ffff))
        }
    }

    /// Reads `size` bytes, 1 to 8.
    pub(crate) fn read_linear(
        &mut self,
        memory: &mut Memory,
        address: u64,
        size: u8,
        access: Access,
    ) -> Flow<u64> {
        let (first, head, second) = self.span(memory, address, size, access)?;
        let low = memory.read_sized(first, head);
        Ok(if head == size {
            low
        } else {
            low | memory.read_sized(second, size - head) << (head * 8)
        })
    }

    /// Writes `size` bytes, 1 to 8, or on a fault none.
    pub(crate) fn write_linear(
        &mut self,
        memory: &mut Memory,
        address: u64,
        size: u8,
        value: u64,
        access: Access,
    ) -> Flow {
        let (first, head, second) = self.span(memory, address, size, access)?;
        memory.write_sized(first, head, value);
        if head < size {
            memory.write_sized(second, size - head, value >> (head * 8));
        }
        Ok(())
    }

    /// Where the bytes are: the first place, how many are there, and where the rest is.
    #[inline]
    fn span(
        &mut self,
        memory: &mut Memory,
        address: u64,
        size: u8,
        access: Access,
    ) -> Flow<(Hpa, u8, Hpa)> {
        let start = self.linear(address)?;
        let room = 0x1000 - start.page_offset();
        let first = self.translate(memory, start, access)?;
        if u64::from(size) <= room {
            return Ok((first, size, first));
        }
        let next = self.linear(address.wrapping_add(room))?;
        let second = self.translate(memory, next, access)?;
        Ok((first, room as u8, second))
    }

    /// Translates a linear address, through what is cached.
    pub(crate) fn translate(&mut self, memory: &mut Memory, gva: Gva, access: Access) -> Flow<Hpa> {
        let wanted = access.wanted();
        if self.regs.cr0 & cr0::PG == 0 {
            let gpa = Gpa::new(gva.as_u64());
            let purpose = Purpose::Linear { gva, paging: PagingRights::ALL };
            return Ok(self.translate_guest_physical(memory, gpa, wanted, purpose)?.locate(gpa));
        }
        let space = self.space();
        if let Some(cached) = self.caches.translation(space, gva) {
            if self.denies(access, cached.writable, cached.user, cached.no_execute) {
                return Err(self.page_fault(gva, access, code::PRESENT));
            }
            if let Some(eptp) = self.eptp()
                && !cached.ept.rights.contains(wanted)
            {
                let gpa = Gpa::new(cached.gpa.as_u64() | offset(gva, cached.shift));
                let paging = PagingRights {
                    user: cached.user,
                    writable: cached.writable,
                    no_execute: cached.no_execute,
                };
                let purpose = Purpose::Linear { gva, paging };
                let (rights, suppress_ve) = (cached.ept.rights, cached.ept.suppress_ve);
                let violation = self.violation(eptp, gpa, wanted, purpose, rights, suppress_ve);
                return Err(Stop::Violation(violation));
            }
            // A write through a mapping with a dirty flag that is not known to be set walks again.
            if access.kind != Kind::Write || cached.dirty && cached.ept.dirty {
                return Ok(Hpa::new(cached.page.as_u64() | offset(gva, cached.shift)));
            }
        }
        let walked = self.walk(memory, space, gva, access)?;
        let gpa = Gpa::new(walked.gpa.as_u64() | offset(gva, walked.shift));
        let paging = PagingRights {
            user: walked.user,
            writable: walked.writable,
            no_execute: walked.no_execute,
        };
        let purpose = Purpose::Linear { gva, paging };
        let found = self.translate_guest_physical(memory, gpa, wanted, purpose)?;
        let at = found.locate(gpa);
        self.set_flags(memory, gva, &walked, access.kind == Kind::Write)?;
        self.keep_structures(space, gva, &walked);
        let shift = if space.ept.is_some() { walked.shift.min(found.shift) } else { walked.shift };
        let low = !((1 << shift) - 1);
        let translation = Translation {
            page: Hpa::new(at.as_u64() & low),
            gpa: Gpa::new(gpa.as_u64() & low),
            shift,
            writable: walked.writable,
            user: walked.user,
            no_execute: walked.no_execute,
            global: walked.global,
            dirty: walked.dirty,
            ept: found.ept,
        };
        self.caches.keep_translation(space, gva, translation);
        Ok(at)
    }

    /// Whether paging's rights deny the access (SDM Vol. 3A, "Determination of Access Rights").
    #[inline]
    fn denies(&self, access: Access, writable: bool, user: bool, no_execute: bool) -> bool {
        if access.user {
            let kind = match access.kind {
                Kind::Read => false,
                Kind::Write => !writable,
                Kind::Fetch => no_execute,
            };
            return !user || kind;
        }
        let cr4 = self.regs.cr4;
        match access.kind {
            Kind::Fetch => no_execute || user && cr4 & cr4::SMEP != 0,
            kind => {
                let exempt = !access.implicit && self.regs.rflags & rflags::AC != 0;
                let smap = user && cr4 & cr4::SMAP != 0 && !exempt;
                smap || kind == Kind::Write && !writable && self.regs.cr0 & cr0::WP != 0
            }
        }
    }

    /// Raises a page fault, which invalidates what would be used for the address.
    #[cold]
    fn page_fault(&mut self, gva: Gva, access: Access, code: u32) -> Stop {
        let Space { vpid, pcid, .. } = self.space();
        self.caches.page_fault(vpid, pcid, gva);
        let nxe = self.regs.efer & efer::NXE != 0 && self.regs.cr4 & cr4::PAE != 0;
        let reports_fetch = nxe || self.regs.cr4 & cr4::SMEP != 0;
        let code = code
            | if access.kind == Kind::Write { code::WRITE } else { 0 }
            | if access.user { code::USER } else { 0 }
            | if access.kind == Kind::Fetch && reports_fetch { code::FETCH } else { 0 };
        let exception = Exception::new(vector::PF, Some(code));
        Stop::Exception(Exception { address: Some(gva), ..exception })
    }

    pub(crate) fn paging_mode(&self) -> Mode {
        if self.regs.is_ia32e() {
            Mode::FourLevel
        } else if self.regs.cr4 & cr4::PAE != 0 {
            Mode::Pae
        } else {
            Mode::Bits32
        }
    }

    /// The walk of the paging structures: from the lowest table that is cached, or from the top.
    fn walk(
        &mut self,
        memory: &mut Memory,
        space: Space,
        gva: Gva,
        access: Access,
    ) -> Flow<Walked> {
        let horizon = self.linear_horizon(space, gva);
        let past = self.past_context(space, horizon);
        let (mode, cr3, pdptes) = match past {
            Some(past) => (past.mode, past.cr3, past.pdptes),
            None => (self.paging_mode(), self.regs.cr3, self.regs.pdptes),
        };
        let linear = gva.as_u64();
        let cached = self.caches.structure(space, gva).filter(|(span, _)| match mode {
            Mode::Bits32 => *span == 22,
            Mode::Pae => *span == 21,
            Mode::FourLevel => matches!(span, 21 | 30 | 39),
        });
        // Where the table is: a guest-physical address, or a physical one from the cache.
        let (mut span, mut table, mut known) = match cached {
            Some((span, structure)) => (span, structure.gpa, Some(structure.table)),
            None => {
                let (span, table) = match mode {
                    Mode::FourLevel => (48, cr3 & entry::FRAME),
                    Mode::Bits32 => (32, cr3 & 0xffff_f000),
                    Mode::Pae => {
                        // Its reserved bits were judged when the register was loaded.
                        let pdpte = pdptes[(linear >> 30 & 3) as usize];
                        if pdpte & entry::PRESENT == 0 {
                            self.refuse_choice(past.is_some());
                            return Err(self.page_fault(gva, access, 0));
                        }
                        (30, pdpte & entry::FRAME)
                    }
                };
                (span, Gpa::new(table), None)
            }
        };
        let began = cached.map_or((true, true, false), |(_, structure)| {
            (structure.writable, structure.user, structure.no_execute)
        });
        let (mut writable, mut user, mut no_execute) = began;

        let (bits, size) = if mode == Mode::Bits32 { (10, 4) } else { (9, 8) };
        let mut used = [Used::default(); 4];
        let mut count = 0;
        loop {
            let shift = span - bits;
            let position = (linear >> shift & ((1 << bits) - 1)) * u64::from(size);
            let gpa = Gpa::new(table.as_u64() | position);
            let at = match known.take() {
                Some(table) => Hpa::new(table.as_u64() | position),
                None => self.structure_access(memory, gpa, gva, false)?,
            };
            let value = self.table_entry(memory, at, size, horizon);
            // Of a past context, a cached table may be used, or a global translation as a whole.
            let of_past = past.is_some_and(|past| count == 0 || past.space.pcid != space.pcid);
            let stale = of_past || value != memory.read_sized(at, size);
            self.refuse_choice(stale && value & entry::ACCESSED == 0);
            if value & entry::PRESENT == 0 {
                self.refuse_choice(stale);
                return Err(self.page_fault(gva, access, 0));
            }
            let leaf = shift == 12 || self.maps_large_page(mode, shift, value);
            if value & self.reserved(mode, shift, leaf) != 0 {
                let code = code::PRESENT | code::RESERVED;
                self.refuse_choice(stale);
                return Err(self.page_fault(gva, access, code));
            }
            writable &= value & entry::WRITABLE != 0;
            user &= value & entry::USER != 0;
            no_execute |= mode != Mode::Bits32 && value & entry::NO_EXECUTE != 0;
            used[count] = Used { gpa, at, value, shift, stale };
            count += 1;
            let write = access.kind == Kind::Write;
            self.refuse_choice(stale && leaf && write && value & entry::DIRTY == 0);
            if leaf {
                let globals = past.map_or(self.regs.cr4 & cr4::PGE != 0, |past| past.globals);
                self.judge_global(value & entry::GLOBAL != 0 && globals);
                break;
            }
            table = Gpa::new(value & entry::FRAME);
            span = shift;
        }
        if self.denies(access, writable, user, no_execute) {
            return Err(self.page_fault(gva, access, code::PRESENT));
        }

        let leaf = used[count - 1];
        Ok(Walked {
            used,
            count,
            size,
            began,
            gpa: Gpa::new(page_of(mode, leaf.value, leaf.shift)),
            shift: leaf.shift,
            writable,
            user,
            no_execute,
            global: leaf.value & entry::GLOBAL != 0 && self.regs.cr4 & cr4::PGE != 0,
            dirty: leaf.value & entry::DIRTY != 0 || access.kind == Kind::Write,
        })
    }

    /// Sets the accessed flags of the entries used and, for a write, the dirty flag of the last
    /// (SDM Vol. 3A, "Accessed and Dirty Flags").
    fn set_flags(&mut self, memory: &mut Memory, gva: Gva, walked: &Walked, write: bool) -> Flow {
        for (index, used) in walked.used[..walked.count].iter().enumerate() {
            let flags = walked.flags(index, write);
            if used.value & flags != flags && !used.stale {
                // The entry is where the walk found it, also through a cached table.
                self.structure_access(memory, used.gpa, gva, true)?;
                let value = memory.read_sized(used.at, walked.size) | flags;
                self.judge_mark(used.at, value);
                memory.write_sized(used.at, walked.size, value);
            }
        }
        Ok(())
    }

    /// Caches the tables that the entries of a walk pointed to, all of which are accessed now.
    fn keep_structures(&mut self, space: Space, gva: Gva, walked: &Walked) {
        let (mut writable, mut user, mut no_execute) = walked.began;
        for pair in walked.used[..walked.count].windows(2) {
            let Used { value, shift, .. } = pair[0];
            writable &= value & entry::WRITABLE != 0;
            user &= value & entry::USER != 0;
            no_execute |= walked.size == 8 && value & entry::NO_EXECUTE != 0;
            let (table, gpa) = (pair[1].at.page(), Gpa::new(value & entry::FRAME));
            let structure = Structure { table, gpa, writable, user, no_execute };
            self.caches.keep_structure(space, gva, shift, structure);
        }
    }

    /// An access to a paging-structure entry: a read, or a locked read and write that sets a flag.
    /// With accessed and dirty flags for EPT, every one counts as a write (SDM Vol. 3C, "Accessed
    /// and Dirty Flags for EPT").
    fn structure_access(
        &mut self,
        memory: &mut Memory,
        gpa: Gpa,
        gva: Gva,
        write: bool,
    ) -> Flow<Hpa> {
        let write = write || self.eptp().is_some_and(|eptp| eptp.accessed_dirty());
        let wanted =
            if write { EptPermissions::READ | EptPermissions::WRITE } else { EptPermissions::READ };
        let purpose = Purpose::Structure { gva };
        Ok(self.translate_guest_physical(memory, gpa, wanted, purpose)?.locate(gpa))
    }

    /// Whether an entry that covers `1 << shift` bytes, more than 4096, maps a page.
    fn maps_large_page(&self, mode: Mode, shift: u8, value: u64) -> bool {
        value & entry::PAGE_SIZE != 0
            && match mode {
                Mode::Bits32 => self.regs.cr4 & cr4::PSE != 0,
                Mode::Pae => true,
                Mode::FourLevel => shift <= 30,
            }
    }

    /// The bits that are reserved in a present entry.
    fn reserved(&self, mode: Mode, shift: u8, leaf: bool) -> u64 {
        let width = self.caps.physical_width;
        if mode == Mode::Bits32 {
            // A 4-MByte page's bits 20:13 are its address's bits 39:32.
            let high = width.saturating_sub(32).min(8);
            let address =
                if leaf && shift == 22 { 0x3f_e000 & !((1 << (13 + high)) - 1) } else { 0 };
            return address;
        }
        let top = if mode == Mode::Pae { 63 } else { 52 };
        let beyond = ((1u64 << top) - 1) & !((1 << width) - 1);
        let no_execute = if self.regs.efer & efer::NXE == 0 { entry::NO_EXECUTE } else { 0 };
        let size = if shift == 39 { entry::PAGE_SIZE } else { 0 };
        let offset = if leaf && shift > 12 { ((1 << shift) - 1) & !0x1fff } else { 0 };
        beyond | no_execute | size | offset
    }

    /// Loads the PDPTE registers from the guest-physical address in CR3 (SDM Vol. 3A, "PDPTE
    /// Registers"): #GP(0) if one has a reserved bit, and then none is loaded. With EPT, a read even
    /// where accessed and dirty flags are enabled.
    pub(crate) fn load_pdptes(&mut self, memory: &mut Memory, cr3: u64) -> Flow<[u64; 4]> {
        let gpa = Gpa::new(cr3 & 0xffff_ffe0);
        let found =
            self.translate_guest_physical(memory, gpa, EptPermissions::READ, Purpose::Pdptes)?;
        let at = found.locate(gpa).as_u64();
        let pdptes = [0, 8, 16, 24].map(|offset| memory.read_u64(Hpa::new(at + offset)));
        if pdptes.iter().all(|pdpte| is_valid_pdpte(*pdpte, self.caps.physical_width)) {
            Ok(pdptes)
        } else {
            fault(Exception::GP)
        }
    }
}

/// The low `shift` bits of an address.
#[inline]
fn offset(gva: Gva, shift: u8) -> u64 {
    gva.as_u64() & ((1 << shift) - 1)
}

/// The address of the page that an entry maps.
fn page_of(mode: Mode, value: u64, shift: u8) -> u64 {
    if mode == Mode::Bits32 {
        if shift == 22 {
            value & 0xffc0_0000 | (value >> 13 & 0xff) << 32
        } else {
            value & 0xffff_f000
        }
    } else {
        value & entry::FRAME & !((1 << shift) - 1)
    }
}
