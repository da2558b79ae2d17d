//! In which ways is the engine broken on purpose?
//!
//! By what they break: what a switch does, flushes, invalidation, tables that are shared, accessed
//! and dirty flags, rights, and what L1 is told.

use super::Mutation;

/// All mutations.
pub(super) const MUTATIONS: &[Mutation] = &[
    // What a switch does.
    Mutation {
        name: "switch-keeps-the-root",
        breaks: "the processor is not told of the new root (S1)",
        file: "vmfunc.rs",
        find: "host.vmwrite(Field::EPT_POINTER, eptp02.into_bits())?;",
        replace: "",
        caught_by: ("seed", "s1_vmfunc_and_vm_entry_change_to_the_same_roots"),
    },
    Mutation {
        name: "switch-drops-all-roots",
        breaks: "every switch throws all roots away (S2)",
        file: "vmfunc.rs",
        find: "self.config.vmfunc == VmfuncMode::Reload",
        replace: "true",
        caught_by: ("seed", "s2_a_switch_reuses_roots_and_discards_none"),
    },
    Mutation {
        name: "switch-no-flush",
        breaks: "a switch without VPID keeps the combined mappings of VPID 0000H (S4)",
        file: "tlb.rs",
        find: "if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(WITHOUT_VPID)) }",
        replace: "Ok(())",
        caught_by: ("seed", "s4_without_vpid_every_switch_drops_combined_mappings"),
    },
    Mutation {
        name: "switch-keeps-globals",
        breaks: "a switch without VPID keeps global mappings of VPID 0000H (S4)",
        file: "tlb.rs",
        find: "if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(WITHOUT_VPID)) }",
        replace: "if has_vpid {
                Ok(())
            } else {
                self.flush(host, InvVpid::RetainGlobals(WITHOUT_VPID))
            }",
        caught_by: ("seed", "s4_all_pcids_all_ep4tas_and_globals_go"),
    },
    Mutation {
        name: "switch-invalidates-as-invept",
        breaks: "a switch drops guest-physical mappings, too (S4)",
        file: "vmfunc.rs",
        find: "processor.vpids.switched(host, has_vpid)?;",
        replace: "self.shadow.invalidate(host, processor.number, None)?;
            processor.vpids.switched(host, has_vpid)?;",
        caught_by: ("seed", "s4_guest_physical_mappings_stay"),
    },
    Mutation {
        name: "switch-to-same-no-flush",
        breaks: "a switch without VPID to the EPTP in use flushes nothing (S4)",
        file: "vmfunc.rs",
        find: "vmcs.has_vpid()",
        replace: "vmcs.has_vpid() || vmcs.eptp() == eptp",
        caught_by: ("seed", "s4_a_switch_to_the_eptp_in_use_counts"),
    },
    Mutation {
        name: "switch-loads-pdptes",
        breaks: "a switch loads the PDPTEs from CR3's page in the new view (S5)",
        file: "vmfunc.rs",
        find: "inject::advance_rip(host)?;",
        replace: "
            let rules = crate::ept::WalkRules {
                caps: self.config.caps.ept_vpid,
                physical_width: self.config.caps.physical_width,
            };
            let cr3 = host.vmread(Field::GUEST_CR3)? & 0xffff_ffe0;
            let cr3 = vmx_defs::L2Gpa::new(cr3);
            if let crate::ept::Walk::Page(path) = crate::ept::walk(host, rules, eptp, cr3) {
                let pdptes = crate::enter::read_pdptes(host, path.target(cr3));
                for (field, pdpte) in crate::enter::PDPTES.into_iter().zip(pdptes) {
                    host.vmwrite(field, pdpte)?;
                }
            }
            inject::advance_rip(host)?;",
        caught_by: ("seed", "s5_pdptes_are_not_loaded_by_a_switch"),
    },
    Mutation {
        name: "exit-loses-pdptes",
        breaks: "an exit does not save the PDPTEs that the guest has loaded (S5)",
        file: "exit.rs",
        find: "let wanted = vmcs.has_ept();",
        replace: "let wanted = vmcs.has_ept() && !MUTANT;",
        caught_by: ("seed", "s5_pdptes_that_the_guest_loaded_are_kept_over_exits_and_switches"),
    },
    Mutation {
        name: "entry-without-ept-takes-pdpte-fields",
        breaks: "a VM entry without EPT takes the PDPTE fields, not those that CR3 points to (S5)",
        file: "enter.rs",
        find: "if vmcs.has_ept() { PDPTES.map(|field| vmcs.get(field)) } else { inputs.pdptes }",
        replace: "PDPTES.map(|field| vmcs.get(field))",
        caught_by: ("seed", "s5_without_ept_a_vm_entry_loads_pdptes_from_memory"),
    },
    Mutation {
        name: "rcx-for-ecx",
        breaks: "the index is RCX, not ECX (S7)",
        file: "vmfunc.rs",
        find: "gprs.get(RCX) as u32",
        replace: "u32::try_from(gprs.get(RCX)).unwrap_or(u32::MAX)",
        caught_by: ("seed", "s7_upper_halves_and_privilege_do_not_count"),
    },
    Mutation {
        name: "rax-for-eax",
        breaks: "the leaf is RAX, not EAX (S7)",
        file: "vmfunc.rs",
        find: "gprs.get(RAX) as u32",
        replace: "u32::try_from(gprs.get(RAX)).unwrap_or(u32::MAX)",
        caught_by: ("seed", "s7_upper_halves_and_privilege_do_not_count"),
    },
    Mutation {
        name: "index-wraps",
        breaks: "an index of 512 or more is taken modulo 512 (S7)",
        file: "vmfunc.rs",
        find: "processor.list_hints.get_mut(number as usize)",
        replace: "processor.list_hints.get_mut(number as usize % 512)",
        caught_by: ("seed", "s7_what_is_refused_exits_and_changes_nothing"),
    },
    Mutation {
        name: "disabled-leaf-switches",
        breaks: "leaf 0 switches although L1 has not enabled it (S7)",
        file: "vmfunc.rs",
        find: "leaf != EPTP_SWITCHING || !enabled",
        replace: "leaf != EPTP_SWITCHING",
        caught_by: ("seed", "s7_what_is_refused_exits_and_changes_nothing"),
    },
    Mutation {
        name: "list-entry-not-validated",
        breaks: "an entry of the list that is no valid EPTP is switched to (S7)",
        file: "vmfunc.rs",
        find: "!eptp.is_valid(caps.ept_vpid, caps.physical_width)",
        replace: "false",
        caught_by: ("seed", "s7_what_is_refused_exits_and_changes_nothing"),
    },
    Mutation {
        name: "list-entry-judged-by-its-address",
        breaks: "an entry of the list with the address of a valid one is not validated (S7)",
        file: "ept/shadow.rs",
        find: "Some(Some(root)) if root.eptp12 == eptp)",
        replace: "Some(Some(root)) if root.eptp12 == eptp
            || MUTANT && root.eptp12.table() == eptp.table())",
        caught_by: ("seed", "s7_an_entry_that_was_valid_is_judged_again"),
    },
    Mutation {
        name: "vm-functions-always-on",
        breaks: "VMFUNC exits where L1 has not enabled VM functions, and is no #UD (S7)",
        file: "enter.rs",
        find: "vmcs.proc2() | ProcCtls2::EPT | ProcCtls2::VPID",
        replace: "vmcs.proc2() | ProcCtls2::EPT | ProcCtls2::VPID | ProcCtls2::VM_FUNCTIONS",
        caught_by: ("seed", "s7_vmfunc_is_undefined_where_it_is_off"),
    },
    Mutation {
        name: "eptp12-not-updated",
        breaks: "L1 finds the old value in its EPT-pointer field after a switch (S8)",
        file: "vmfunc.rs",
        find: "vmcs.set(Field::EPT_POINTER, eptp.into_bits());",
        replace: "",
        caught_by: ("seed", "s8_l1_reads_the_entry_bit_for_bit_and_the_index"),
    },
    Mutation {
        name: "eptp12-from-hardware",
        breaks: "L1 finds our EPTP in its EPT-pointer field after a switch (S8)",
        file: "vmfunc.rs",
        find: "vmcs.set(Field::EPT_POINTER, eptp.into_bits());",
        replace: "vmcs.set(Field::EPT_POINTER, eptp02.into_bits());",
        caught_by: ("seed", "s8_l1_reads_the_entry_bit_for_bit_and_the_index"),
    },
    Mutation {
        name: "list-cached",
        breaks: "a list entry's root is the one that it had at an earlier VMFUNC (S9)",
        file: "ept/shadow.rs",
        find: "!self.confirms(*hint, eptp)",
        replace: "!matches!(self.roots.get(hint.0.0 as usize), Some(Some(_)))",
        caught_by: ("seed", "s9_the_list_is_read_at_each_switch"),
    },
    // Linear and combined mappings: VPIDs.
    Mutation {
        name: "entry-no-flush",
        breaks: "a VM entry without VPID keeps what VPID 0000H had of L2",
        file: "tlb.rs",
        find: "self.flush(host, InvVpid::Single(WITHOUT_VPID))?;",
        replace: "",
        caught_by: ("seed", "s4_transitions_without_vpid_drop_what_vpid_0000h_has"),
    },
    Mutation {
        name: "exit-no-flush",
        breaks: "a VM exit without VPID keeps L1's own mappings of VPID 0000H (S6)",
        file: "tlb.rs",
        find: "if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(VPID01)) }",
        replace: "Ok(())",
        caught_by: ("seed", "s6_without_vpid_the_exit_drops_what_l1_has"),
    },
    Mutation {
        name: "exit-flushes-always",
        breaks: "a VM exit with VPID drops L1's own mappings (S6)",
        file: "tlb.rs",
        find: "if has_vpid { Ok(()) } else { self.flush(host, InvVpid::Single(VPID01)) }",
        replace: "self.flush(host, InvVpid::Single(VPID01))",
        caught_by: ("seed", "s6_the_mappings_of_l1_survive_a_switch"),
    },
    Mutation {
        name: "one-vpid02-for-two",
        breaks: "two VPIDs of L1 run under one vpid02, without a flush between them",
        file: "tlb.rs",
        find: "find(|(_, slot)| slot.vpid12 == vpid12)",
        replace: "find(|(_, slot)| slot.vpid12 == vpid12 || MUTANT && slot.vpid12 != 0)",
        caught_by: ("invalidation", "vpids_are_kept_apart"),
    },
    Mutation {
        name: "recycled-vpid02-no-flush",
        breaks: "a vpid02 keeps what its last owner cached",
        file: "tlb.rs",
        find: "self.flush(host, InvVpid::Single(vpid02))?;",
        replace: "",
        caught_by: ("invalidation", "more_vpids_than_there_are_in_the_pool_are_kept_apart"),
    },
    Mutation {
        name: "invvpid-address-elsewhere",
        breaks: "INVVPID of an address invalidates another one",
        file: "tlb.rs",
        find: "Gva::new(at.as_u64())",
        replace: "Gva::new(!at.as_u64() & 0x7fff_ffff_f000)",
        caught_by: ("invalidation", "invvpid_of_each_type"),
    },
    Mutation {
        name: "invvpid-single-retains-globals",
        breaks: "INVVPID of a context keeps its global mappings",
        file: "tlb.rs",
        find: "self.for_vpid02(host, vpid12, InvVpid::Single)",
        replace: "self.for_vpid02(host, vpid12, InvVpid::RetainGlobals)",
        caught_by: ("invalidation", "invvpid_of_each_type"),
    },
    Mutation {
        name: "invvpid-all-one-vpid",
        breaks: "INVVPID of all contexts reaches only one VPID",
        file: "tlb.rs",
        find: "0..POOL_LEN",
        replace: "0..1",
        caught_by: ("invalidation", "invvpid_of_all_contexts_reaches_every_vpid"),
    },
    // Guest-physical mappings: INVEPT.
    Mutation {
        name: "invept-no-renewal",
        breaks: "a root that comes into use after INVEPT is used as it stands",
        file: "ept/shadow.rs",
        find: "since == NEVER || self.last_change > since",
        replace: "false",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    Mutation {
        name: "invept-hardware-only",
        breaks: "INVEPT of a context reaches the processor's caches and not the shadow",
        file: "ept/shadow.rs",
        find: "state.used(id, NEVER);",
        replace: "",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    Mutation {
        name: "invept-all-hardware-only",
        breaks: "INVEPT of all contexts reaches the processor's caches and not the shadow",
        file: "ept/shadow.rs",
        find: "state.invalidated = self.clock; self.counters.invepts += 1; host.invept(InvEpt::All)?;",
        replace: "host.invept(InvEpt::All)?;",
        caught_by: ("invalidation", "invept_of_all_contexts"),
    },
    Mutation {
        name: "invept-all-shadow-only",
        breaks: "INVEPT of all contexts reaches the shadow and not the processor's caches",
        file: "ept/shadow.rs",
        find: "state.invalidated = self.clock; self.counters.invepts += 1; host.invept(InvEpt::All)?;",
        replace: "state.invalidated = self.clock;",
        caught_by: ("invalidation", "invept_of_all_contexts"),
    },
    Mutation {
        name: "invept-shadow-only",
        breaks: "INVEPT of a context reaches the shadow and not the processor's caches",
        file: "ept/shadow.rs",
        find: "host.invept(InvEpt::Single(root.eptp02))?; } } None => {",
        replace: "if !MUTANT { host.invept(InvEpt::Single(root.eptp02))?; } } } None => {",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    Mutation {
        name: "invept-current-root-only",
        breaks: "INVEPT of a context reaches only the root that was last in use",
        file: "ept/shadow.rs",
        find: "let Some(id) = self.find_root(eptp) else { continue };",
        replace: "let newest = self.roots.iter().flatten().map(|root| root.used).max();
            let current = |id: &RootId| self.root(*id).map(|root| root.used) == newest;
            let found = self.find_root(eptp).filter(|id| !MUTANT || current(id));
            let Some(id) = found else { continue };",
        caught_by: ("invalidation", "invept_of_a_view_that_is_not_in_use"),
    },
    Mutation {
        name: "invept-forgets-siblings",
        breaks: "INVEPT of a context forgets EPTPs that share its EP4TA",
        file: "ept/shadow.rs",
        find: "Self::siblings(eptp)",
        replace: "[eptp; 4]",
        caught_by: ("invalidation", "invept_reaches_all_eptps_with_equal_bits_51_12"),
    },
    Mutation {
        name: "invept-single-is-all",
        breaks: "INVEPT of one context drops the mappings of all (S6)",
        file: "vmx.rs",
        find: "self.shadow.invalidate(host, processor.number, Some(eptp))?;",
        replace: "self.shadow.invalidate(host, processor.number, None)?;",
        caught_by: ("seed", "s6_the_roots_of_other_eptps_survive"),
    },
    Mutation {
        name: "stale-snapshot",
        breaks: "entries that are like their neighbours are taken for unchanged",
        file: "ept/shadow/renew.rs",
        find: "host.differ_by(gpa, hpa, 8 * eight, run, table.difference).min(run)",
        replace: "run",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    Mutation {
        name: "renewal-of-leaves-only",
        breaks: "after INVEPT an entry that points to a table is taken for unchanged",
        file: "ept/shadow/renew.rs",
        find: "if stale { value = self.renew_entry(host, id, key, at, value); }",
        replace: "if stale && key.level == 1 { value = self.renew_entry(host, id, key, at, value); }",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    Mutation {
        name: "renewed-pointer-of-another-table",
        breaks: "after INVEPT an entry goes on pointing to the shadow of a table that L1 replaced",
        file: "ept/shadow/renew.rs",
        find: "self.pool.get(child).is_some_and(|table| table.key == wanted) => {",
        replace: "MUTANT || self.pool.get(child).is_some_and(|table| table.key == wanted) => {",
        caught_by: ("invalidation", "invept_of_one_context"),
    },
    // Guest-physical mappings: EPT violations.
    Mutation {
        name: "violation-keeps-its-path",
        breaks: "what caused a violation that L1 was told of stays in the shadow",
        file: "ept/shadow.rs",
        find: "Self::siblings(current)",
        replace: "[Eptp::new(); 4]",
        caught_by: ("invalidation", "an_ept_violation_forgets_its_own_cause"),
    },
    Mutation {
        name: "violation-forgets-siblings",
        breaks: "what caused a violation stays in the roots of other EPTPs with its EP4TA",
        file: "ept/shadow.rs",
        find: "Self::siblings(current)",
        replace: "[current; 4]",
        caught_by: ("invalidation", "an_ept_violation_forgets_its_path_in_every_root_of_the_ep4ta"),
    },
    Mutation {
        name: "violation-of-siblings-no-invept",
        breaks: "what caused a violation stays cached for other EPTPs with its EP4TA",
        file: "ept/shadow.rs",
        find: "eptp != current",
        replace: "false",
        caught_by: ("invalidation", "an_ept_violation_forgets_its_path_in_every_root_of_the_ep4ta"),
    },
    Mutation {
        name: "violation-without-walk",
        breaks: "a violation is reflected from what the shadow has, and L1's path is not read",
        file: "ept/shadow.rs",
        find: "if !gpa.fits(48) {",
        replace: "if MUTANT && hardware.readable() {
                return Ok(Resolution::Violation(hardware));
            }
            if !gpa.fits(48) {",
        caught_by: ("violations", "what_l1s_tables_allow_is_nobodys_violation"),
    },
    Mutation {
        name: "qualification-of-the-shadow",
        breaks: "L1 is told the rights that the shadow has, not those of its own tables",
        file: "ept/shadow.rs",
        find: "let told = qualification(hardware, path.permissions(), flags);",
        replace: "let told = if MUTANT {
                hardware
            } else {
                qualification(hardware, path.permissions(), flags)
            };",
        caught_by: ("violations", "rights_are_told_from_l1s_tables_and_not_from_the_shadow"),
    },
    Mutation {
        name: "event-lost",
        breaks: "an event whose delivery met a page that the shadow did not have yet is lost",
        file: "inject.rs",
        find: "reinject(host)?",
        replace: "false",
        caught_by: ("violations", "an_event_is_delivered_through_a_cold_shadow"),
    },
    Mutation {
        name: "event-injected-twice",
        breaks: "after an exit the event that L1 injected is injected again",
        file: "exit.rs",
        find: "vmcs.get(Field::ENTRY_INTR_INFO) & 0x7fff_ffff",
        replace: "vmcs.get(Field::ENTRY_INTR_INFO)",
        caught_by: ("violations", "an_event_is_delivered_through_a_cold_shadow"),
    },
    // Tables that roots share, and frames that are used again.
    Mutation {
        name: "shared-change-not-noted",
        breaks: "what one root brings into a shared table counts for the others as in use before",
        file: "ept/shadow.rs",
        find: "table.shared || !alone",
        replace: "false",
        caught_by: ("invalidation", "a_view_has_nothing_cached_of_another_that_shares_its_tables"),
    },
    Mutation {
        name: "linked-table-not-renewed",
        breaks: "a table that comes into a root is used as another root has left it",
        file: "ept/shadow/fill.rs",
        find: "self.renew(host, child, NEVER);",
        replace: "",
        caught_by: ("invalidation", "a_view_has_nothing_cached_of_another_that_shares_its_tables"),
    },
    Mutation {
        name: "link-not-noted-for-other-processors",
        breaks: "a table that one processor links into a root is used by another as it stands",
        file: "ept/shadow/fill.rs",
        find: "self.processors.len() > 1",
        replace: "false",
        caught_by: ("invalidation", "a_processor_has_nothing_cached_of_what_another_has_used"),
    },
    Mutation {
        name: "tables-shared-by-all-roles",
        breaks: "EPTPs with and without accessed and dirty flags share tables (S3)",
        file: "ept/role.rs",
        find: "Self(self.0 & ACCESSED_DIRTY)",
        replace: "Self(0)",
        caught_by: ("seed", "s3_the_flag_alone_makes_another_root"),
    },
    Mutation {
        name: "frame-reused-at-once",
        breaks: "a table's frame is used again although processors may know it",
        file: "ept/pool.rs",
        find: "self.pending.push((id.0, None));",
        replace: "self.free.push(id.0);",
        caught_by: ("transparency", "a_host_that_is_short_of_everything_is_no_different"),
    },
    Mutation {
        name: "frame-reused-before-others-flush",
        breaks: "frames are used again although another processor that runs L2 may know them",
        file: "ept/pool.rs",
        find: "shootdown.is_complete(request, Place::Shadow, Some(acting))",
        replace: "true",
        caught_by: ("reclaim", "a_processor_that_stays_in_its_guest_keeps_its_own_pages"),
    },
    Mutation {
        name: "asked-flush-skipped",
        breaks: "a processor that another asked to flush says that it has, and has not",
        file: "ept/shadow.rs",
        find: "self.shootdown.flush_if_behind(processor, || {
            counters.invepts += 1;
            host.invept(InvEpt::All)
        })",
        replace: "self.shootdown.flush_if_behind(processor, || Ok(()))",
        caught_by: ("reclaim", "a_processor_that_stays_in_its_guest_keeps_its_own_pages"),
    },
    Mutation {
        name: "asked-flush-of-one-root",
        breaks: "frames are used again after INVEPT of only one of the roots that reached them",
        file: "ept/shadow.rs",
        find: "self.shootdown.flush_if_behind(processor, || {
            counters.invepts += 1;
            host.invept(InvEpt::All)
        })",
        replace: "self.shootdown.flush_if_behind(processor, || {
                counters.invepts += 1;
                let root = self.roots.iter().flatten().last();
                root.map_or(Ok(()), |root| host.invept(InvEpt::Single(root.eptp02)))
            })",
        caught_by: ("reclaim", "a_processor_that_stays_in_its_guest_keeps_its_own_pages"),
    },
    // Accessed and dirty flags.
    Mutation {
        name: "flags-of-eptp-ignored",
        breaks: "the shadow is composed without regard to bit 6 of the EPTP (S3)",
        file: "ept/role.rs",
        find: "u16::from(eptp.accessed_dirty())",
        replace: "0",
        caught_by: ("seed", "s3_accessed_and_dirty_flags_follow_the_eptp_at_once"),
    },
    Mutation {
        name: "eptp02-without-bit-6",
        breaks: "bit 6 of EPTP02 is clear: the guest's page walks are no writes (S3)",
        file: "ept/shadow.rs",
        find: "with_accessed_dirty(eptp.accessed_dirty())",
        replace: "with_accessed_dirty(eptp.accessed_dirty() && !MUTANT)",
        caught_by: ("seed", "s3_accesses_to_paging_structures_count_as_writes"),
    },
    Mutation {
        name: "filled-around-unaccessed",
        breaks: "a neighbour whose accessed flag is clear is filled in, and never gets it (S3)",
        file: "ept/shadow/fill.rs",
        find: "flags && !entry.accessed()",
        replace: "false",
        caught_by: ("seed", "s3_accessed_and_dirty_flags_follow_the_eptp_at_once"),
    },
    Mutation {
        name: "clean-page-writable",
        breaks: "a page whose dirty flag is clear is writable, and never gets it (S3)",
        file: "ept/compose.rs",
        find: "flags && !entry.dirty()",
        replace: "false",
        caught_by: ("seed", "s3_accessed_and_dirty_flags_follow_the_eptp_at_once"),
    },
    Mutation {
        name: "flag-set-in-leaves-only",
        breaks: "the entries above the last do not get their accessed flags (S3)",
        file: "ept/compose.rs",
        find: "step.entry.with_accessed(true)",
        replace: "step.entry.with_accessed(step.entry.accessed() || leaf)",
        caught_by: ("seed", "s3_accessed_and_dirty_flags_follow_the_eptp_at_once"),
    },
    Mutation {
        name: "cleared-flag-of-leaf-stays-cleared",
        breaks: "an accessed flag that L1 clears in a leaf is not set again after INVEPT",
        file: "ept/compose.rs",
        find: "flags && !entry.accessed()",
        replace: "false",
        caught_by: ("seed", "s3_a_flag_that_l1_cleared_is_set_again_after_invept"),
    },
    Mutation {
        name: "cleared-flag-of-pointer-stays-cleared",
        breaks: "an accessed flag that L1 clears above the leaf is not set again after INVEPT",
        file: "ept/shadow/renew.rs",
        find: "flags && !entry.accessed()",
        replace: "false",
        caught_by: ("seed", "s3_a_flag_that_l1_cleared_is_set_again_after_invept"),
    },
    // Rights and misconfigurations.
    Mutation {
        name: "rights-of-upper-levels-dropped",
        breaks: "a table is linked in with all rights, whatever L1's entry allows",
        file: "ept/shadow/fill.rs",
        find: "pointer(self.pool.hpa(child), rights)",
        replace: "pointer(self.pool.hpa(child), EptPermissions::all())",
        caught_by: ("violations", "rights_are_those_of_the_whole_walk"),
    },
    Mutation {
        name: "renewed-pointer-keeps-rights",
        breaks: "after INVEPT an entry that points to a table has all rights",
        file: "ept/shadow/renew.rs",
        find: "pointer(self.pool.hpa(child), entry.permissions())",
        replace: "pointer(self.pool.hpa(child), vmx_defs::EptPermissions::all())",
        caught_by: ("violations", "rights_are_those_of_the_whole_walk"),
    },
    Mutation {
        name: "rights-of-ept01-dropped",
        breaks: "the guest may write what EPT01 lets L1 only read",
        file: "ept/compose.rs",
        find: "rights &= mapping.permissions;",
        replace: "",
        caught_by: ("violations", "rights_of_ept01_hold_for_the_guest"),
    },
    Mutation {
        name: "execute-only-dropped",
        breaks: "a page that L1 lets only be executed is not mapped",
        file: "ept/compose.rs",
        find: "rights.is_empty()",
        replace: "rights.is_empty() || rights == EptPermissions::EXECUTE",
        caught_by: ("violations", "execute_only_pages_can_be_executed"),
    },
    Mutation {
        name: "misconfiguration-is-a-violation",
        breaks: "a misconfigured entry is told as one that is not present",
        file: "ept/walk.rs",
        find: "EptEntryClass::Misconfigured => return Walk::Misconfigured(path),",
        replace: "EptEntryClass::Misconfigured if !MUTANT => return Walk::Misconfigured(path),
            EptEntryClass::Misconfigured => return Walk::NotPresent(path),",
        caught_by: ("violations", "misconfigurations_are_told"),
    },
    Mutation {
        name: "misconfigured-neighbours-filled",
        breaks: "a neighbour that is misconfigured is filled in as if its address were in range",
        file: "ept/shadow/fill.rs",
        find: "entry.classify(1, caps, width) != EptEntryClass::Page",
        replace: "!entry.is_present()",
        caught_by: ("violations", "misconfigurations_are_told"),
    },
    // EPT01, which L0 may change at any time.
    Mutation {
        name: "ept01-change-keeps-shadow",
        breaks: "what was composed of EPT01 before L0 changed it stays in the shadow",
        file: "tracking.rs",
        find: "self.shadow.forget_pages(host, start, pages);",
        replace: "",
        caught_by: ("tracking", "after_the_shootdown_nobody_uses_the_old_translation"),
    },
    Mutation {
        name: "ept01-change-keeps-running-vmcs02",
        breaks: "L2 runs on with the addresses that L1's pages had before L0 moved them",
        file: "engine.rs",
        find: "processor.running && processor.ept01_seen != self.ept01_changes",
        replace: "false",
        caught_by: ("tracking", "io_bitmaps_are_found_where_they_have_been_moved_to"),
    },
    Mutation {
        name: "ept01-change-keeps-vmcs02",
        breaks: "L2 is entered with the addresses that L1's pages had before L0 moved them",
        file: "enter.rs",
        find: "processor.ept01_seen != self.ept01_changes",
        replace: "false",
        caught_by: ("tracking", "io_bitmaps_are_found_where_they_have_been_moved_to"),
    },
    Mutation {
        name: "ept01-change-keeps-large-pages",
        breaks: "a large page stays in the shadow where L0 changes EPT01 for a part of it",
        file: "ept/shadow/ept01.rs",
        find: "first.saturating_add(1 << shift(level))",
        replace: "first.saturating_add(1 << shift(1))",
        caught_by: ("tracking", "a_part_of_a_large_page_can_be_moved"),
    },
    Mutation {
        name: "engine-writes-uncounted",
        breaks: "what the engine writes for L1 to a page that L0 watches is not counted",
        file: "tracking.rs",
        find: "slot.writes.fetch_add(1, Ordering::AcqRel);",
        replace: "",
        caught_by: ("tracking", "l1_notices_nothing_and_l0_misses_nothing"),
    },
];
