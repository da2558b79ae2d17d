//! What did GRUB hand over? Its memory map, the modules with their strings, and our command line,
//! taken out of the multiboot2 information before anything moves.

use arrayvec::ArrayVec;
use multiboot2::{BootInformation, BootInformationHeader};

use crate::madt::RootTable;
use crate::phys::{AREA_RAM, Area, DIRECT_MAP, MemoryMap, Span, direct};

/// Most modules that are passed on.
pub(crate) const MAX_MODULES: usize = 64;

/// A module, where GRUB put it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedModule {
    /// Its bytes.
    pub(crate) bytes: Span,
    /// Its string, without the ending NUL, inside the boot information.
    pub(crate) string: Span,
}

/// Everything taken from the boot information.
#[derive(Debug)]
pub(crate) struct Handover {
    /// The machine's memory.
    pub(crate) map: MemoryMap,
    /// The modules in order: the first is the L1 image.
    pub(crate) modules: ArrayVec<LoadedModule, MAX_MODULES>,
    /// L0's own command line, inside the boot information.
    pub(crate) command_line: Span,
    /// ACPI's root table.
    pub(crate) acpi: Option<RootTable>,
    /// The boot information itself.
    pub(crate) information: Span,
}

/// Why the hand-over is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandoverError {
    /// The structure is malformed.
    Malformed,
    /// It has no memory map.
    NoMemoryMap,
    /// It has more modules than [`MAX_MODULES`].
    TooManyModules,
}

impl core::fmt::Display for HandoverError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the multiboot2 information is malformed",
            Self::NoMemoryMap => "the boot loader gave no memory map",
            Self::TooManyModules => "more than 64 modules",
        })
    }
}

/// Where `text`, which is seen through the direct map, lies.
fn place_of(text: &str) -> Span {
    let start = text.as_ptr() as u64 - DIRECT_MAP;
    Span { start, end: start + text.len() as u64 }
}

impl Handover {
    /// Reads the boot information at physical address `address`.
    ///
    /// # Errors
    /// See [`HandoverError`].
    ///
    /// # Safety
    /// `address` is what the boot loader passed, and the direct map reaches it.
    pub(crate) unsafe fn read(address: u32) -> Result<Self, HandoverError> {
        let header = direct::<BootInformationHeader>(u64::from(address));
        // SAFETY: as the caller promises; `load` checks the tags.
        let boot =
            unsafe { BootInformation::load(header) }.map_err(|_| HandoverError::Malformed)?;
        let information = Span::sized(u64::from(address), boot.total_size() as u64)
            .ok_or(HandoverError::Malformed)?;

        let mut map = MemoryMap::default();
        for area in boot.memory_map_tag().ok_or(HandoverError::NoMemoryMap)?.memory_areas() {
            let span = Span::sized(area.start_address(), area.size());
            let kind = area.typ().val();
            if let Some(span) = span {
                map.push(Area { span, kind });
            }
        }
        if !map.areas().iter().any(|area| area.kind == AREA_RAM) {
            return Err(HandoverError::NoMemoryMap);
        }
        let command_line = match boot.command_line_tag() {
            Some(tag) => place_of(tag.cmdline().map_err(|_| HandoverError::Malformed)?),
            None => Span::default(),
        };
        let mut modules = ArrayVec::new();
        for tag in boot.module_tags() {
            let bytes = Span {
                start: u64::from(tag.start_address()),
                end: u64::from(tag.end_address().max(tag.start_address())),
            };
            let string = place_of(tag.cmdline().map_err(|_| HandoverError::Malformed)?);
            modules
                .try_push(LoadedModule { bytes, string })
                .map_err(|_| HandoverError::TooManyModules)?;
        }
        let acpi = match (boot.rsdp_v2_tag(), boot.rsdp_v1_tag()) {
            (Some(tag), _) => Some(RootTable::Xsdt(tag.xsdt_address() as u64)),
            (None, Some(tag)) => Some(RootTable::Rsdt(tag.rsdt_address() as u64)),
            (None, None) => None,
        };
        Ok(Self { map, modules, command_line, acpi, information })
    }
}
