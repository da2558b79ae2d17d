//! What has the processor cached about address translation, and which event makes it forget what?
//!
//! SDM Vol. 3C, "Caching Translation Information", and Vol. 3A, "Caching Translation Information"
//! for what is independent of VMX. There are three kinds of mappings. *Linear* mappings are used
//! where EPT is not, and carry a VPID and a PCID. *Guest-physical* mappings carry an EP4TA, bits
//! 51:12 of the EPTP. *Combined* mappings, of linear addresses through both structures, carry all
//! three. Each kind has translations (of pages) and paging-structure-cache entries (of tables).
//! Root operation, and guests without VPID, use VPID 0000H.
//!
//! The methods named after operations invalidate what the SDM says they must and nothing else; that
//! a processor may forget more is the business of the [`Retention`] policy. Cached mappings may
//! differ from the tables in memory, and are used all the same.

use rustc_hash::FxHashMap;
use vmx_defs::{EptPermissions, Gva, Hpa};

use crate::addr::Gpa;
use crate::retention::{Keeper, Retention};

/// The tags of a linear or a combined mapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Space {
    /// The VPID: 0000H in root operation and where VPIDs are disabled.
    pub vpid: u16,
    /// The PCID: 000H where PCIDs are disabled.
    pub pcid: u16,
    /// The EP4TA (bits 51:12 of the EPTP, in place), for combined mappings.
    pub ept: Option<u64>,
}

/// Stands in the place of a PCID for global translations, which any PCID may use.
const GLOBAL: u16 = u16::MAX;

/// A cached linear or combined translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Where the page is.
    pub page: Hpa,
    /// The guest-physical address that paging gave for the page; equal to `page` without EPT.
    pub gpa: Gpa,
    /// Log2 of the page's size in bytes.
    pub shift: u8,
    /// R/W of all entries.
    pub writable: bool,
    /// U/S of all entries.
    pub user: bool,
    /// XD of any entry.
    pub no_execute: bool,
    /// G of the entry that maps the page, where CR4.PGE was set.
    pub global: bool,
    /// The dirty flag of the page's entry is set.
    pub dirty: bool,
    /// The EPT's part; all rights without EPT.
    pub ept: EptPage,
}

/// What EPT says of a page, besides where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptPage {
    /// Rights along the walk.
    pub rights: EptPermissions,
    /// The dirty flag is set, or there is none.
    pub dirty: bool,
    /// Bit 63 of the entry that maps the page.
    pub suppress_ve: bool,
}

impl EptPage {
    /// Where EPT is not in use.
    pub const NONE: Self = Self { rights: EptPermissions::all(), dirty: true, suppress_ve: true };
}

/// A cached guest-physical translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestTranslation {
    /// Where the page is.
    pub page: Hpa,
    /// Log2 of the page's size in bytes.
    pub shift: u8,
    /// Rights and flags.
    pub ept: EptPage,
}

/// A paging-structure-cache entry of linear or combined mappings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Structure {
    /// Where the table is.
    pub table: Hpa,
    /// Its guest-physical address; equal to `table` without EPT.
    pub gpa: Gpa,
    /// R/W of the entries on the way to it.
    pub writable: bool,
    /// U/S of the entries on the way to it.
    pub user: bool,
    /// XD of any entry on the way to it.
    pub no_execute: bool,
}

/// A paging-structure-cache entry of guest-physical mappings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestStructure {
    /// Where the table is.
    pub table: Hpa,
    /// Rights of the entries on the way to it.
    pub rights: EptPermissions,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct PageKey {
    space: Space,
    shift: u8,
    number: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct GuestKey {
    ep4ta: u64,
    shift: u8,
    number: u64,
}

/// Page sizes and spans of tables, smallest first: the order of look-up.
const PAGE_SHIFTS: [u8; 4] = [12, 21, 22, 30];
const TABLE_SHIFTS: [u8; 4] = [21, 22, 30, 39];

/// What one logical processor has cached.
#[derive(Clone, Debug)]
pub struct Caches {
    keeper: Keeper,
    translations: FxHashMap<PageKey, Translation>,
    structures: FxHashMap<PageKey, Structure>,
    guest_translations: FxHashMap<GuestKey, GuestTranslation>,
    guest_structures: FxHashMap<GuestKey, GuestStructure>,
    /// Shifts that any key has or had, as a bit mask, so that look-ups skip the others.
    shifts: u64,
    guest_shifts: u64,
    log: Option<Log>,
}

impl Caches {
    /// Empty caches under a policy.
    pub fn new(policy: Retention) -> Self {
        Self {
            keeper: Keeper::new(policy),
            translations: FxHashMap::default(),
            structures: FxHashMap::default(),
            guest_translations: FxHashMap::default(),
            guest_structures: FxHashMap::default(),
            shifts: 0,
            guest_shifts: 0,
            log: None,
        }
    }

    /// Number of linear and combined mappings, and of guest-physical ones.
    pub fn len(&self) -> (usize, usize) {
        (
            self.translations.len() + self.structures.len(),
            self.guest_translations.len() + self.guest_structures.len(),
        )
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// Between two instructions, the policy may forget everything.
    pub(crate) fn between_instructions(&mut self) {
        if self.keeper.forgot_all() {
            self.clear();
        }
    }

    /// Forgets everything, as power-up and reset do.
    pub fn clear(&mut self) {
        self.translations.clear();
        self.structures.clear();
        self.guest_translations.clear();
        self.guest_structures.clear();
    }
}

/// Use of what is cached.
impl Caches {
    /// The translation of a linear address, a global one too.
    #[inline]
    pub(crate) fn translation(&mut self, space: Space, gva: Gva) -> Option<Translation> {
        for shift in PAGE_SHIFTS {
            if self.shifts >> shift & 1 == 0 {
                continue;
            }
            for pcid in [space.pcid, GLOBAL] {
                let key = page_key(Space { pcid, ..space }, shift, gva);
                if let Some(found) = self.translations.get(&key) {
                    let found = *found;
                    if !self.keeper.forgot() {
                        return Some(found);
                    }
                    self.translations.remove(&key);
                }
            }
        }
        None
    }

    /// Caches a translation; one that is there for the same page is replaced.
    pub(crate) fn keep_translation(&mut self, space: Space, gva: Gva, translation: Translation) {
        if self.keeper.caches() {
            let space = if translation.global { Space { pcid: GLOBAL, ..space } } else { space };
            self.shifts |= 1 << translation.shift;
            self.translations.insert(page_key(space, translation.shift, gva), translation);
        }
    }

    /// The lowest table cached on the way to a linear address, and log2 of the bytes that the table
    /// spans: 21 or 22 for a table whose entries map 4-KByte pages, and so on.
    #[inline]
    pub(crate) fn structure(&mut self, space: Space, gva: Gva) -> Option<(u8, Structure)> {
        for shift in TABLE_SHIFTS {
            let key = page_key(space, shift, gva);
            if let Some(found) = self.structures.get(&key) {
                let found = *found;
                if !self.keeper.forgot() {
                    return Some((shift, found));
                }
                self.structures.remove(&key);
            }
        }
        None
    }

    /// Caches the way to a table that spans `1 << shift` bytes.
    pub(crate) fn keep_structure(&mut self, space: Space, gva: Gva, shift: u8, entry: Structure) {
        if self.keeper.caches() {
            self.structures.insert(page_key(space, shift, gva), entry);
        }
    }

    /// The translation of a guest-physical address.
    #[inline]
    pub(crate) fn guest_translation(&mut self, ep4ta: u64, gpa: Gpa) -> Option<GuestTranslation> {
        for shift in PAGE_SHIFTS {
            if self.guest_shifts >> shift & 1 == 0 {
                continue;
            }
            let key = guest_key(ep4ta, shift, gpa);
            if let Some(found) = self.guest_translations.get(&key) {
                let found = *found;
                if !self.keeper.forgot() {
                    return Some(found);
                }
                self.guest_translations.remove(&key);
            }
        }
        None
    }

    /// Caches a guest-physical translation; one that is there for the same page is replaced.
    pub(crate) fn keep_guest_translation(&mut self, ep4ta: u64, gpa: Gpa, entry: GuestTranslation) {
        if self.keeper.caches() {
            self.guest_shifts |= 1 << entry.shift;
            self.guest_translations.insert(guest_key(ep4ta, entry.shift, gpa), entry);
        }
    }

    /// The lowest EPT table cached on the way to a guest-physical address, and log2 of the bytes
    /// that it spans.
    #[inline]
    pub(crate) fn guest_structure(&mut self, ep4ta: u64, gpa: Gpa) -> Option<(u8, GuestStructure)> {
        for shift in TABLE_SHIFTS {
            let key = guest_key(ep4ta, shift, gpa);
            if let Some(found) = self.guest_structures.get(&key) {
                let found = *found;
                if !self.keeper.forgot() {
                    return Some((shift, found));
                }
                self.guest_structures.remove(&key);
            }
        }
        None
    }

    /// Caches the way to an EPT table that spans `1 << shift` bytes.
    pub(crate) fn keep_guest_structure(
        &mut self,
        ep4ta: u64,
        gpa: Gpa,
        shift: u8,
        entry: GuestStructure,
    ) {
        if self.keeper.caches() {
            self.guest_structures.insert(guest_key(ep4ta, shift, gpa), entry);
        }
    }
}

/// Operations independent of VMX: SDM Vol. 3A, "Operations that Invalidate TLBs and
/// Paging-Structure Caches". They concern the current VPID only, but there the linear and, for all
/// EP4TAs, the combined mappings, whether or not EPT is in use.
impl Caches {
    /// INVLPG: the translations of the page for the current PCID, global ones whatever the PCID, and
    /// all paging-structure-cache entries of the current PCID.
    pub fn invlpg(&mut self, vpid: u16, pcid: u16, gva: Gva) {
        self.drop(Scope::of(vpid, Pcids::OneAndGlobal(pcid)).at(gva));
        self.structures.retain(|key, _| !(key.space.vpid == vpid && key.space.pcid == pcid));
    }

    /// MOV to CR3 that names `pcid` (000H where PCIDs are disabled) with bit 63 clear: its
    /// translations but for global ones, and its paging-structure-cache entries.
    pub fn mov_to_cr3(&mut self, vpid: u16, pcid: u16) {
        self.drop(Scope::of(vpid, Pcids::One(pcid)));
    }

    /// MOV to CR4 that changes PAE or sets SMEP: what belongs to the current PCID. (Whether global
    /// translations belong to it, the SDM leaves open; here they go.)
    pub fn mov_to_cr4(&mut self, vpid: u16, pcid: u16) {
        self.drop(Scope::of(vpid, Pcids::OneAndGlobal(pcid)));
    }

    /// MOV to CR0 that clears PG, MOV to CR4 that changes PGE or clears PCIDE, INVPCID type 2 (all
    /// contexts, with globals): everything of the VPID.
    pub fn all_contexts(&mut self, vpid: u16) {
        self.drop(Scope::of(vpid, Pcids::All));
    }

    /// INVPCID type 0 (individual address): mappings for the address and the PCID, but for global
    /// translations.
    pub fn invpcid_address(&mut self, vpid: u16, pcid: u16, gva: Gva) {
        self.drop(Scope::of(vpid, Pcids::One(pcid)).at(gva));
    }

    /// INVPCID type 1 (single context): mappings of the PCID, but for global translations.
    pub fn invpcid_context(&mut self, vpid: u16, pcid: u16) {
        self.drop(Scope::of(vpid, Pcids::One(pcid)));
    }

    /// INVPCID type 3 (all contexts): mappings of all PCIDs, but for global translations.
    pub fn invpcid_all_but_globals(&mut self, vpid: u16) {
        self.drop(Scope::of(vpid, Pcids::AllButGlobal));
    }

    /// A page fault: what would be used for the address, with the current PCID.
    pub fn page_fault(&mut self, vpid: u16, pcid: u16, gva: Gva) {
        self.drop(Scope::of(vpid, Pcids::OneAndGlobal(pcid)).at(gva));
    }
}

/// Operations of VMX: SDM Vol. 3C, "Operations that Invalidate Cached Mappings".
impl Caches {
    /// VM entry or VM exit with "enable VPID" 0: linear and combined mappings of VPID 0000H, for all
    /// PCIDs and EP4TAs.
    pub fn transition_without_vpid(&mut self) {
        self.drop(Scope::of(0, Pcids::All));
    }

    /// VMFUNC that switches the EPTP with "enable VPID" 0: combined mappings of VPID 0000H, for all
    /// PCIDs and EP4TAs (S4; "EPTP Switching").
    pub fn eptp_switch_without_vpid(&mut self) {
        self.drop(Scope { epts: Epts::Combined, ..Scope::of(0, Pcids::All) });
    }

    /// An EPT violation: guest-physical mappings that would be used for the guest-physical address
    /// with the current EP4TA. If it was the translation of a linear address, combined mappings for
    /// that address with the current tags as well.
    pub fn ept_violation(&mut self, ep4ta: u64, gpa: Gpa, translated: Option<(Space, Gva)>) {
        let guests = Guests::Path(ep4ta, gpa);
        self.drop(match translated {
            Some((space, gva)) => Scope {
                epts: Epts::One(ep4ta),
                guests,
                ..Scope::of(space.vpid, Pcids::OneAndGlobal(space.pcid)).at(gva)
            },
            None => Scope { guests, ..Scope::NOTHING },
        });
    }

    /// INVEPT, single-context: guest-physical mappings of the EP4TA, and combined ones of it for all
    /// VPIDs and PCIDs.
    pub fn invept_single(&mut self, ep4ta: u64) {
        let guests = Guests::One(ep4ta);
        self.drop(Scope { vpids: Vpids::All, epts: Epts::One(ep4ta), guests, ..Scope::NOTHING });
    }

    /// INVEPT, all-context: all guest-physical and combined mappings.
    pub fn invept_all(&mut self) {
        let guests = Guests::All;
        self.drop(Scope { vpids: Vpids::All, epts: Epts::Combined, guests, ..Scope::NOTHING });
    }

    /// INVVPID type 0 (individual address): mappings of the VPID for the address, for all PCIDs and
    /// EP4TAs, global ones too.
    pub fn invvpid_address(&mut self, vpid: u16, gva: Gva) {
        self.drop(Scope::of(vpid, Pcids::All).at(gva));
    }

    /// INVVPID type 1 (single context): mappings of the VPID.
    pub fn invvpid_single(&mut self, vpid: u16) {
        self.drop(Scope::of(vpid, Pcids::All));
    }

    /// INVVPID type 2 (all contexts): mappings of all VPIDs but 0000H.
    pub fn invvpid_all(&mut self) {
        self.drop(Scope { vpids: Vpids::AllButZero, ..Scope::NOTHING });
    }

    /// INVVPID type 3 (single context, retaining globals): mappings of the VPID, but for global
    /// translations.
    pub fn invvpid_retaining_globals(&mut self, vpid: u16) {
        self.drop(Scope::of(vpid, Pcids::AllButGlobal));
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Vpids {
    None,
    One(u16),
    AllButZero,
    All,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pcids {
    All,
    One(u16),
    OneAndGlobal(u16),
    AllButGlobal,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Epts {
    /// Linear mappings, and combined ones of any EP4TA.
    All,
    /// Combined mappings of any EP4TA.
    Combined,
    One(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Guests {
    None,
    /// What would be used for an address.
    Path(u64, Gpa),
    One(u64),
    All,
}

/// The mappings that an operation must invalidate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scope {
    vpids: Vpids,
    pcids: Pcids,
    epts: Epts,
    /// Only what would be used for this linear address.
    gva: Option<Gva>,
    guests: Guests,
}

impl Scope {
    const NOTHING: Self = Self {
        vpids: Vpids::None,
        pcids: Pcids::All,
        epts: Epts::All,
        gva: None,
        guests: Guests::None,
    };

    const fn of(vpid: u16, pcids: Pcids) -> Self {
        Self { vpids: Vpids::One(vpid), pcids, ..Self::NOTHING }
    }

    const fn at(self, gva: Gva) -> Self {
        Self { gva: Some(gva), ..self }
    }

    /// Whether linear and combined mappings with these tags are in the scope.
    fn has_space(&self, space: &Space) -> bool {
        let vpid = match self.vpids {
            Vpids::None => false,
            Vpids::One(vpid) => space.vpid == vpid,
            Vpids::AllButZero => space.vpid != 0,
            Vpids::All => true,
        };
        let pcid = match self.pcids {
            Pcids::All => true,
            Pcids::One(pcid) => space.pcid == pcid,
            Pcids::OneAndGlobal(pcid) => space.pcid == pcid || space.pcid == GLOBAL,
            Pcids::AllButGlobal => space.pcid != GLOBAL,
        };
        let ept = match self.epts {
            Epts::All => true,
            Epts::Combined => space.ept.is_some(),
            Epts::One(ep4ta) => space.ept == Some(ep4ta),
        };
        vpid && pcid && ept
    }

    fn has(&self, key: &PageKey) -> bool {
        self.has_space(&key.space) && self.gva.is_none_or(|gva| key.covers(gva))
    }

    fn has_guest(&self, key: &GuestKey) -> bool {
        match self.guests {
            Guests::None => false,
            Guests::Path(ep4ta, gpa) => key.ep4ta == ep4ta && key.covers(gpa),
            Guests::One(ep4ta) => key.ep4ta == ep4ta,
            Guests::All => true,
        }
    }
}

impl Caches {
    /// Drops what is in a scope.
    fn drop(&mut self, scope: Scope) {
        if scope.vpids != Vpids::None {
            self.translations.retain(|key, _| !scope.has(key));
            self.structures.retain(|key, _| !scope.has(key));
        }
        if scope.guests != Guests::None {
            self.guest_translations.retain(|key, _| !scope.has_guest(key));
            self.guest_structures.retain(|key, _| !scope.has_guest(key));
        }
        if let Some(log) = &mut self.log {
            log.events.push((log.now, scope));
        }
    }
}

/// When what was invalidated: for whoever asks what a processor may still have cached.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Log {
    now: u64,
    events: Vec<(u64, Scope)>,
}

impl Caches {
    /// Begins to keep a log, or sets its clock.
    pub(crate) fn set_time(&mut self, now: u64) {
        self.log.get_or_insert_default().now = now;
    }

    /// Whether the same was invalidated at the same times.
    pub(crate) fn has_same_log(&self, other: &Self) -> bool {
        self.log == other.log
    }

    fn last(&self, until: u64, hit: impl Fn(&Scope) -> bool) -> u64 {
        let Some(log) = &self.log else { return 0 };
        let mut events = log.events.iter().rev();
        events.find(|(time, scope)| *time <= until && hit(scope)).map_or(0, |(time, _)| *time)
    }

    /// Since when a linear or combined translation of a page may be cached, one that is global or
    /// not.
    pub(crate) fn since(&self, space: Space, gva: Gva, global: bool) -> u64 {
        let space = if global { Space { pcid: GLOBAL, ..space } } else { space };
        let key = page_key(space, 12, gva);
        self.last(u64::MAX, |scope| scope.has(&key))
    }

    /// Since when a guest-physical mapping of a page may have been cached that was there at a time.
    pub(crate) fn since_guest(&self, ep4ta: u64, gpa: Gpa, at: u64) -> u64 {
        let key = guest_key(ep4ta, 12, gpa);
        self.last(at, |scope| scope.has_guest(&key))
    }
}

impl GuestKey {
    fn covers(&self, gpa: Gpa) -> bool {
        gpa.as_u64() >> self.shift == self.number
    }
}

impl PageKey {
    fn covers(&self, gva: Gva) -> bool {
        gva.as_u64() >> self.shift == self.number
    }
}

#[inline]
fn page_key(space: Space, shift: u8, gva: Gva) -> PageKey {
    PageKey { space, shift, number: gva.as_u64() >> shift }
}

#[inline]
fn guest_key(ep4ta: u64, shift: u8, gpa: Gpa) -> GuestKey {
    GuestKey { ep4ta, shift, number: gpa.as_u64() >> shift }
}

#[cfg(test)]
mod tests;
