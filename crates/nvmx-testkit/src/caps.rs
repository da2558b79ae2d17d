//! What is L1 offered on a given processor, and which bare machine does it then believe in?

use nvmx::caps::{Caps, HardwareCaps};
use vmx_model::ModelCaps;
use vmx_model::caps::LINEAR_WIDTH;

/// What the engine reads of a processor.
pub fn hardware_caps(hardware: &ModelCaps) -> HardwareCaps {
    HardwareCaps {
        msrs: HardwareCaps::read_msrs(|index| hardware.msr(index).unwrap_or(0)),
        physical_width: hardware.physical_width,
        linear_width: LINEAR_WIDTH,
        efer: hardware.efer,
        debugctl: hardware.debugctl,
        sgx: false,
    }
}

/// What L1 is offered.
///
/// # Panics
/// Where the processor lacks what L0 can't do without.
pub fn offered(hardware: &ModelCaps) -> Caps {
    Caps::offered(&hardware_caps(hardware))
        .unwrap_or_else(|missing| panic!("no host for the engine: {missing:?}"))
}

/// The bare machine that L1 believes in.
///
/// # Panics
/// Where the engine offers something that the model does not implement.
pub fn bare_caps(hardware: &ModelCaps) -> ModelCaps {
    let caps = offered(hardware);
    let bare = ModelCaps {
        basic: caps.basic,
        pin: caps.pin,
        proc: caps.proc,
        proc2: caps.proc2,
        exit: caps.exit,
        entry: caps.entry,
        misc: caps.misc,
        cr0_fixed0: caps.cr0_fixed0,
        cr0_fixed1: caps.cr0_fixed1,
        cr4_fixed0: caps.cr4_fixed0,
        cr4_fixed1: caps.cr4_fixed1,
        ept_vpid: caps.ept_vpid,
        vm_functions: caps.vm_functions,
        physical_width: caps.physical_width,
        efer: caps.efer,
        debugctl: caps.debugctl,
    };
    if let Err(error) = bare.check() {
        panic!("the model can't be what L1 is offered: {error:?}");
    }
    bare
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmx_defs::msr;

    #[test]
    fn the_bare_machine_reads_like_the_offer() {
        let hardware = ModelCaps::default();
        let (offered, bare) = (offered(&hardware), bare_caps(&hardware));
        for index in msr::VMX_BASIC..=msr::VMX_VMFUNC {
            assert_eq!(offered.read_msr(index), bare.msr(index), "MSR {index:#x}");
        }
        for (field, name) in vmx_defs::field::FIELDS {
            assert_eq!(offered.supports(*field), bare.supports(*field), "{name}");
        }
    }
}
