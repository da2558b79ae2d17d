//! Which address space does this number belong to?
//!
//! Nested virtualization handles addresses of four spaces in one function; each has its own type,
//! so that the compiler refuses to mix them. There are no operators: arithmetic is explicit and
//! checked.

use core::fmt;

/// Size of a 4-KByte page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! physical {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address `addr`, in bytes. Any 64-bit value: callers check widths.
            #[inline]
            pub const fn new(addr: u64) -> Self {
                Self(addr)
            }

            /// The address as a number of bytes.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The address of the 4-KByte page that holds this one.
            #[inline]
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// The byte offset within the 4-KByte page, 0 to 4095.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// Whether the address is a multiple of `align` bytes, a power of two.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & align.wrapping_sub(1) == 0
            }

            /// The address `bytes` further on, or `None` past the end of the 64-bit space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(addr) => Some(Self(addr)),
                    None => None,
                }
            }

            /// Whether the address fits in `width` bits (0 to 64): the check of the SDM's "must not
            /// set any bits beyond the processor's physical-address width".
            #[inline]
            pub const fn fits(self, width: u8) -> bool {
                width >= 64 || self.0 >> width == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

physical! {
    /// Host-physical address: what the processor puts on the bus.
    Hpa
}
physical! {
    /// Guest-physical address of L1: what L1 calls physical. EPT01 takes it to an [`Hpa`].
    L1Gpa
}
physical! {
    /// Guest-physical address of L2. L1's EPT (EPT12) takes it to an [`L1Gpa`]; where L1 runs L2
    /// without EPT, it *is* an [`L1Gpa`].
    L2Gpa
}
physical! {
    /// Linear address of a guest (L1 or L2, as the function says), before guest paging.
    Gva
}

impl L2Gpa {
    /// The L1 address that this address *is* when L1 runs L2 without EPT.
    #[inline]
    pub const fn without_ept(self) -> L1Gpa {
        L1Gpa::new(self.0)
    }
}
