//! Answers: how does the first processor keep global state?

use core::cell::UnsafeCell;

/// A global that only the first processor uses.
///
/// [`get`](Self::get) hands out a raw pointer: whoever dereferences it argues that no other
/// reference is live. The program takes no interrupt; the only asynchronous entry is an exception,
/// whose handler touches [`traps`](crate::traps) alone. Other processors, where a case starts them,
/// keep off these globals; what is theirs says so ([`smp`](crate::smp)).
pub struct Single<T>(UnsafeCell<T>);

// SAFETY: only the first processor uses it, or the one that its place says.
unsafe impl<T> Sync for Single<T> {}

impl<T> Single<T> {
    /// Wraps `value`.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The address of the value.
    pub const fn get(&self) -> *mut T {
        self.0.get()
    }
}
