//! Which processors does the machine have? ACPI's multiple APIC description table says so.
//!
//! Read from the tables that GRUB pointed at ("Advanced Configuration and Power Interface
//! Specification", "Multiple APIC Description Table"): a walk of one table. The `acpi` crate would
//! bring an AML interpreter's worth of interface for it.

use arrayvec::ArrayVec;

use crate::phys::direct;

/// Most processors that L0 runs L1 on.
pub(crate) const MAX_PROCESSORS: usize = 32;

/// Where ACPI's root table is, and how wide the pointers in it are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RootTable {
    /// RSDT, with 32-bit pointers.
    Rsdt(u64),
    /// XSDT, with 64-bit pointers.
    Xsdt(u64),
}

/// More processors than L0 can take, which L1 could start behind its back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

/// Bytes of a table's header.
const HEADER: u64 = 36;
/// No table that is looked at is longer.
const LONGEST: u64 = 1 << 20;
/// Bytes of the MADT's own fields behind the header.
const MADT_FIELDS: u64 = 8;

/// The table at `address`, if it lies below `limit`: where the direct map ends.
fn table(address: u64, limit: u64) -> Option<&'static [u8]> {
    let end = address.checked_add(HEADER)?;
    if address == 0 || end > limit {
        return None;
    }
    // SAFETY: within the direct map; nobody writes to ACPI's tables while L0 boots.
    let header = unsafe { core::slice::from_raw_parts(direct::<u8>(address), HEADER as usize) };
    let len = u64::from(u32_at(header, 4)?);
    if !(HEADER..=LONGEST).contains(&len) || address.checked_add(len)? > limit {
        return None;
    }
    // SAFETY: as above.
    Some(unsafe { core::slice::from_raw_parts(direct::<u8>(address), len as usize) })
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..offset + 8)?.try_into().ok()?))
}

fn find_madt(root: RootTable, limit: u64) -> Option<&'static [u8]> {
    let (address, width) = match root {
        RootTable::Rsdt(address) => (address, 4),
        RootTable::Xsdt(address) => (address, 8),
    };
    table(address, limit)?.get(HEADER as usize..)?.chunks_exact(width).find_map(|entry| {
        let address = if width == 4 { u64::from(u32_at(entry, 0)?) } else { u64_at(entry, 0)? };
        table(address, limit).filter(|table| table.starts_with(b"APIC"))
    })
}

/// The local APIC identifiers of all usable processors; none where there is no table.
///
/// # Errors
/// [`TooMany`].
pub(crate) fn processors(
    root: Option<RootTable>,
    limit: u64,
) -> Result<ArrayVec<u32, MAX_PROCESSORS>, TooMany> {
    let mut found = ArrayVec::new();
    let Some(madt) = root.and_then(|root| find_madt(root, limit)) else { return Ok(found) };
    let mut rest = madt.get((HEADER + MADT_FIELDS) as usize..).unwrap_or_default();
    while let [kind, len, ..] = *rest {
        let Some(entry) = rest.get(..usize::from(len)).filter(|entry| entry.len() >= 2) else {
            break;
        };
        // Processor local APIC, and processor local x2APIC: identifier and flags.
        let (identifier, flags) = match kind {
            0 => (entry.get(3).map(|id| u32::from(*id)), u32_at(entry, 4)),
            9 => (u32_at(entry, 4), u32_at(entry, 8)),
            _ => (None, None),
        };
        // Flag 0: enabled. Flag 1 (could be enabled later) is for hot plug, which L0 has not.
        if let (Some(identifier), Some(flags)) = (identifier, flags)
            && flags & 1 != 0
            && !found.contains(&identifier)
        {
            found.try_push(identifier).map_err(|_| TooMany)?;
        }
        rest = rest.get(usize::from(len)..).unwrap_or_default();
    }
    Ok(found)
}
