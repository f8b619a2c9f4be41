//! What this host's CPU is made for.

/// Whether AES-GCM is faster here than ChaCha20-Poly1305: there are instructions for AES and for GCM's carry-less
/// multiplication. (Without them AES is slow, or its timing gives keys away.)
pub fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq")
        && std::arch::is_x86_feature_detected!("avx");
    #[cfg(target_arch = "aarch64")]
    let has =
        std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_what_the_kernel_says() {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
        let flags: Vec<&str> = line.map(|line| line.split_whitespace().collect()).unwrap_or_default();
        let wanted: &[&str] =
            if cfg!(target_arch = "x86_64") { &["aes", "pclmulqdq", "avx"] } else { &["aes", "pmull"] };
        assert_eq!(super::has_aes(), wanted.iter().all(|flag| flags.contains(flag)));
    }
}
