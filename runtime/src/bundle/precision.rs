//! How weights are stored, and in which forms graphs compute with them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats, expanded when loaded.
    F16,
    /// 8-bit integers with scales.
    I8,
    /// The layers' matrices in 4-bit integers with a scale for each 32 inputs of an output, the others as in [`Self::I8`].
    I4,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::I8, Self::I4];

    /// The name on the command line, in the manifest and of the bundle's sub-folder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I8 => "i8",
            Self::I4 => "i4",
        }
    }

    /// The forms that graphs of this precision can have.
    #[must_use]
    pub fn forms(self) -> &'static [Form] {
        match self {
            Self::F32 | Self::F16 => &[Form::Expanded],
            Self::I8 => &Form::ALL,
            // TensorRT multiplies 4-bit matrices with 16-bit numbers only.
            Self::I4 => &[Form::Expanded, Form::Dynamic],
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == name);
        found.ok_or_else(|| format!("{name} is none of f32, f16, i8, i4"))
    }
}

/// How the graphs of a precision compute. All forms of a precision read the same weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// In floats: weights are expanded, when they are loaded or as they are read. Every precision has it, every engine runs it.
    Expanded,
    /// Products of 8-bit numbers, or of 8- and 4-bit ones: what a weight is multiplied with is quantized as it comes
    /// (`DynamicQuantizeLinear`, `MatMulInteger`; `MatMulNBits`). For processors, on ONNX Runtime and tract; the latter rounds each row
    /// by itself.
    Dynamic,
    /// Products of 8-bit numbers: what a weight is multiplied with is quantized by a scale that calibration fixed
    /// (`QuantizeLinear`, `DequantizeLinear`). For TensorRT.
    Static,
}

impl Form {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Expanded, Self::Dynamic, Self::Static];

    /// The name on the command line and in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Expanded => "expanded",
            Self::Dynamic => "dynamic",
            Self::Static => "static",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Form {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|form| form.name() == name);
        found.ok_or_else(|| format!("{name} is none of expanded, dynamic, static"))
    }
}
