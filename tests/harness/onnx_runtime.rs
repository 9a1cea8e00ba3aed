use unimo::engine::ort_library;

/// Whether ONNX Runtime is there; says so where it is not.
///
/// # Panics
/// Where it is not there, and `UNIMO_REQUIRE_ORT` is set.
#[must_use]
pub fn ort_is_there() -> bool {
    match ort_library(None) {
        Ok(_) => true,
        Err(error) if std::env::var_os("UNIMO_REQUIRE_ORT").is_some() => panic!("{error}"),
        Err(error) => {
            println!("not tested: {error}");
            false
        }
    }
}
