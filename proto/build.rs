//! Compiles the .proto files with protox, so that no protoc is needed, and gives each message the proto3 JSON
//! mapping that `muster -o json` prints and `muster apply` reads.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: &[&str] = &[
    "muster/admin/v1/admin.proto",
    "muster/agent/v1/agent.proto",
    "muster/director/v1/director.proto",
    "muster/enrollment/v1/enrollment.proto",
    "muster/registration/v1/registration.proto",
    "muster/storage/v1/storage.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=muster");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    let descriptors = compiler.encode_file_descriptor_set();
    fs::write(out.join("descriptors.bin"), &descriptors)?;

    tonic_prost_build::configure()
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .codec_path("crate::codec::SmallCodec")
        .btree_map(".")
        // Slices of the message that they came in: frames are not copied.
        .bytes(".muster.director.v1.RelayRequest.frames")
        .bytes(".muster.director.v1.RelayResponse.frames")
        .compile_fds(compiler.file_descriptor_set())?;

    pbjson_build::Builder::new()
        .register_descriptors(&descriptors)?
        .btree_map([".muster"])
        .ignore_unknown_enum_variants()
        .build(&[".muster"])?;
    Ok(())
}
