//! Tests of super-packets, by what they are about.
