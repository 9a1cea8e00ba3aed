//! Which form of the graphs an engine runs.

use super::{EngineError, EngineKind, EngineOptions, Provider};
use crate::bundle::manifest::Form;

/// The form to run of those that are `present`: the one asked for, or what is fastest of it on this processor. The caller sees to
/// it that a form asked for is there.
///
/// # Errors
/// Where the engine does not run the form asked for.
pub fn preferred_form(options: &EngineOptions, present: &[Form]) -> Result<Form, EngineError> {
    let engine = options.engine;
    match options.form {
        Some(form) if engine == EngineKind::Tract && form == Form::Static => Err(EngineError::Form { engine, form }),
        Some(form) => Ok(form),
        None => Ok(fastest(engine, options.provider, multiplies_bytes(engine), present)),
    }
}

fn fastest(engine: EngineKind, provider: Provider, bytes: bool, present: &[Form]) -> Form {
    let form = match (engine, provider) {
        (EngineKind::Tract, _) | (EngineKind::Ort, Provider::Cpu) if bytes => Form::Dynamic,
        (EngineKind::Ort, Provider::Tensorrt) => Form::Static,
        _ => Form::Expanded,
    };
    if present.contains(&form) { form } else { Form::Expanded }
}

/// Whether the processor adds products of bytes to 32-bit sums in one instruction (VNNI, dot product) that the engine uses. Others
/// of x86-64 add pairs of them in 16 bits, where sums of full-range bytes do not fit: ONNX Runtime warns of that
/// (<https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html>), and floats are as fast there.
fn multiplies_bytes(engine: EngineKind) -> bool {
    #[cfg(feature = "tract")]
    if engine == EngineKind::Tract {
        return crate::kernels::multiplies_bytes();
    }
    #[cfg(target_arch = "x86_64")]
    let has = is_x86_feature_detected!("avx512vnni") || is_x86_feature_detected!("avxvnni");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has && engine == EngineKind::Ort
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_engine_gets_the_form_that_it_is_fast_with() {
        use Form::{Dynamic, Expanded, Static};
        use Provider::{Cpu, Cuda, Tensorrt};
        let (all, alone) = ([Expanded, Dynamic, Static], [Expanded]);
        for (engine, provider, bytes, present, expected) in [
            (EngineKind::Tract, Cpu, true, &all[..], Dynamic),
            (EngineKind::Tract, Cpu, false, &all, Expanded),
            (EngineKind::Tract, Cpu, true, &alone, Expanded),
            (EngineKind::Ort, Cpu, true, &all, Dynamic),
            (EngineKind::Ort, Cpu, false, &all, Expanded),
            (EngineKind::Ort, Cpu, true, &alone, Expanded),
            (EngineKind::Ort, Cuda, true, &all, Expanded),
            (EngineKind::Ort, Tensorrt, false, &all, Static),
            (EngineKind::Ort, Tensorrt, false, &alone, Expanded),
        ] {
            assert_eq!(fastest(engine, provider, bytes, present), expected, "{engine} {provider} {bytes} {present:?}");
        }
    }

    #[test]
    fn what_is_asked_for_is_run_or_refused() {
        let asked = |engine, form| EngineOptions { engine, form: Some(form), ..EngineOptions::default() };
        let run = |engine, form| preferred_form(&asked(engine, form), &Form::ALL);
        assert_eq!(run(EngineKind::Ort, Form::Static).unwrap(), Form::Static);
        assert_eq!(run(EngineKind::Tract, Form::Expanded).unwrap(), Form::Expanded);
        assert_eq!(run(EngineKind::Tract, Form::Dynamic).unwrap(), Form::Dynamic);
        let error = run(EngineKind::Tract, Form::Static).unwrap_err().to_string();
        assert_eq!(error, "engine tract does not run the static form of graphs");
    }
}
