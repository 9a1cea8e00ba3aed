//! `get_throttled` of a Raspberry Pi's firmware.

use std::path::Path;

use serde::Serialize;

use super::text;

/// The bits that the firmware tells: what is so now, and what has been since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "ThrottlingReport")]
pub struct Throttling {
    /// As the firmware gives them.
    pub bits: u32,
}

/// What holds a Raspberry Pi back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThrottlingCause {
    /// The supply gives less than 4.63 V: a stronger one, or a shorter cable.
    UnderVoltage,
    /// The clock is capped.
    FrequencyCapped,
    /// The clock is lowered, because of heat or voltage.
    Throttled,
    /// The soft temperature limit (`temp_soft_limit`) is reached, and the clock is lowered.
    SoftTemperatureLimit,
}

impl ThrottlingCause {
    /// In the order of their bits; what has been since the start is told 16 bits higher.
    const ALL: [Self; 4] = [Self::UnderVoltage, Self::FrequencyCapped, Self::Throttled, Self::SoftTemperatureLimit];

    /// In words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::UnderVoltage => "under-voltage",
            Self::FrequencyCapped => "clock capped",
            Self::Throttled => "throttled",
            Self::SoftTemperatureLimit => "soft temperature limit",
        }
    }
}

impl Throttling {
    /// What holds it back now.
    #[must_use]
    pub fn now(self) -> Vec<ThrottlingCause> {
        Self::causes(self.bits)
    }

    /// What has held it back at any time since it was started.
    #[must_use]
    pub fn since_start(self) -> Vec<ThrottlingCause> {
        Self::causes(self.bits >> 16)
    }

    fn causes(bits: u32) -> Vec<ThrottlingCause> {
        ThrottlingCause::ALL.into_iter().enumerate().filter(|(bit, _)| bits >> bit & 1 != 0).map(|(_, cause)| cause).collect()
    }
}

/// What JSON output holds.
#[derive(Debug, Serialize)]
struct ThrottlingReport {
    bits: String,
    now: Vec<ThrottlingCause>,
    since_start: Vec<ThrottlingCause>,
}

impl From<Throttling> for ThrottlingReport {
    fn from(throttling: Throttling) -> Self {
        let bits = format!("{:#x}", throttling.bits);
        Self { bits, now: throttling.now(), since_start: throttling.since_start() }
    }
}

/// Reads the firmware's file. Its folder is `soc/soc:firmware` up to the Raspberry Pi 4 and has an address in its name on others.
pub(super) fn read(root: &Path) -> Option<Throttling> {
    let platform = root.join("sys/devices/platform");
    let folders = |folder: &Path, part: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let mut found: Vec<_> =
            entries.filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().contains(part))).collect();
        found.sort();
        found
    };
    let places = folders(&platform, "").into_iter().flat_map(|device| {
        let inner = folders(&device, "firmware");
        inner.into_iter().chain([device])
    });
    let bits = |text: String| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    places.into_iter().find_map(|place| bits(text(&place.join("get_throttled"))?)).map(|bits| Throttling { bits })
}
