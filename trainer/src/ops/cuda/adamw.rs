//! AdamW over all tensors at once: two kernels for the gradient's norm and one for the update, whatever the number of tensors.

use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Result, Shape, Tensor, Var};
use std::sync::atomic::{AtomicU64, Ordering};

use super::copy;
use super::machine::{Address, Grid, Kernel, arguments};
use super::operator::on_machine;
use super::recording::{OfMachine, Records};
use crate::ops::kernels::AdamWStep;

/// Values of a piece: what one block updates.
const PIECE: usize = 1 << 14;
/// Words of a `Piece`.
const WORDS: usize = 12;

/// Where a tensor's values begin. Asked for as by an operator that writes them, because the update does.
struct Locate(AtomicU64);

impl InplaceOp1 for Locate {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, _))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("adamw: expected contiguous f32");
        };
        self.0.store(values[start..].as_mut_ptr() as u64, Ordering::Relaxed);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let place = super::nvidia::Nvidia::new(&storage.device).input("adamw", storage, layout)?;
        self.0.store(place.at.0, Ordering::Relaxed);
        Ok(())
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _storage: &mut CudaStorage, _layout: &Layout) -> Result<()> {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }
}

fn locate(tensor: &Tensor) -> Result<Address> {
    let locate = Locate(AtomicU64::new(0));
    tensor.inplace_op1(&locate)?;
    Ok(Address(locate.0.into_inner()))
}

/// A tensor to be updated.
pub struct Tuned<'a> {
    /// Weights.
    pub weights: &'a Var,
    /// First moment, of the weights' shape.
    pub first: &'a Tensor,
    /// Second moment.
    pub second: &'a Tensor,
    /// Gradient, contiguous.
    pub gradient: &'a Tensor,
    /// Learning rate.
    pub rate: f32,
    /// Decoupled weight decay.
    pub decay: f32,
}

/// An update of all tensors at once.
pub struct DeviceAdamW<'a> {
    /// What is updated.
    pub tensors: Vec<Tuned<'a>>,
    /// Largest global norm of the gradient.
    pub clip_norm: f32,
    /// Number of updates so far, and room for two values more, `[3]`; counted on.
    pub progress: &'a Tensor,
    /// Decays and eps; rate, decay and scale of the gradient are each tensor's own, or found on the device, as corrections are.
    pub step: AdamWStep,
}

impl DeviceAdamW<'_> {
    /// Updates the weights and moments, unless the gradient is not finite, and gives the gradient's global norm, `[1]`. The host does
    /// not wait.
    ///
    /// # Errors
    /// Tensors elsewhere than on `device`, and those of candle.
    pub fn update(&self, updates: &Updates, device: &Device) -> Result<Tensor> {
        on_machine!(device, "adamw", |machine| updates.0.with(|| Engine::new(&machine), |engine| engine.update(self)))
    }

    /// What it is used as, and a `Piece` of the kernels for every piece.
    fn told(&self) -> Result<(Use, Vec<u32>)> {
        let mut words = Vec::new();
        for tensor in &self.tensors {
            let places = [tensor.weights.as_tensor(), tensor.first, tensor.second, tensor.gradient].map(locate);
            let [weights, first, second, gradient] = places;
            let places = [weights?, first?, second?, gradient?];
            let values = tensor.weights.elem_count();
            for start in (0..values).step_by(PIECE) {
                for place in places {
                    let Address(at) = place.after(start);
                    words.extend([at as u32, (at >> 32) as u32]);
                }
                words.extend([PIECE.min(values - start) as u32, tensor.rate.to_bits(), tensor.decay.to_bits(), 0]);
            }
        }
        let AdamWStep { beta1, beta2, eps, .. } = self.step;
        let scalars = [self.clip_norm, beta1, beta2, eps];
        Ok((Use { pieces: words.len() / WORDS, progress: locate(self.progress)?, scalars }, words))
    }
}

/// All that has to be the same for a recording to do for another update.
#[derive(Clone, Copy, PartialEq)]
struct Use {
    pieces: usize,
    progress: Address,
    /// Largest norm, both decays and eps.
    scalars: [f32; 4],
}

/// Updates of the same tensors one after another: all but the first are a recording, which on a CUDA device is a graph.
#[derive(Default)]
pub struct Updates(OfMachine);

impl Updates {
    /// How many were replayed.
    #[cfg(test)]
    pub fn replayed(&self) -> u64 {
        self.0.look(|engine: &Engine<super::emulation::Emulated>| engine.replayed).unwrap_or_default()
    }
}

struct Engine<M: Records> {
    machine: M,
    last: Option<Laid<M>>,
    replayed: u64,
    /// The machine does not record.
    refuses: bool,
}

/// Where an update finds its pieces, and what it finds on the way.
struct Laid<M: Records> {
    used_as: Use,
    table: M::Words,
    sums: M::Values,
    norm: M::Values,
    recording: Option<M::Recording>,
}

impl<M: Records> Engine<M> {
    fn new(machine: &M) -> Result<Self> {
        Ok(Self { machine: machine.apart()?, last: None, replayed: 0, refuses: false })
    }

    /// The gradient's norm.
    fn update(&mut self, update: &DeviceAdamW) -> Result<Tensor> {
        let (used_as, words) = update.told()?;
        let machine = &self.machine;
        let laid = match self.last.take() {
            Some(mut laid) if laid.used_as == used_as => {
                machine.overwrite(&mut laid.table, &words)?;
                if laid.recording.is_none() && !self.refuses {
                    match machine.record(|| ask(machine, &laid)) {
                        Ok(((), recording)) => laid.recording = Some(recording),
                        Err(error) => {
                            eprintln!("AdamW's work could not be recorded as a graph, and is asked for anew each time: {error}");
                            self.refuses = true;
                        }
                    }
                }
                laid
            }
            _ => {
                let (sums, norm) = (machine.allocate(used_as.pieces)?, machine.allocate(1)?);
                Laid { used_as, table: machine.upload(&words)?, sums, norm, recording: None }
            }
        };
        match &laid.recording {
            Some(recording) => {
                machine.replay(recording)?;
                self.replayed += 1;
            }
            None => ask(machine, &laid)?,
        }
        let norm = machine.allocate(1)?;
        copy(machine, machine.at(&laid.norm), machine.at(&norm), 1)?;
        self.last = Some(laid);
        self.machine.tensor(norm, &Shape::from(1))
    }
}

/// Asks for an update.
fn ask<M: Records>(machine: &M, laid: &Laid<M>) -> Result<()> {
    let Use { pieces, progress, scalars: [clip, beta1, beta2, eps] } = laid.used_as;
    let (table, sums, norm) = (machine.words_at(&laid.table), machine.at(&laid.sums), machine.at(&laid.norm));
    if pieces > 0 {
        machine.launch(Kernel("adamw", "square_sums"), Grid::reducing(pieces), arguments![table, sums])?;
    }
    let of_norm = arguments![sums, norm, progress, pieces as u32, beta1, beta2];
    machine.launch(Kernel("adamw", "root_of_sum"), Grid::reducing(1), of_norm)?;
    if pieces > 0 {
        let of_pieces = arguments![table, norm, progress, clip, beta1, beta2, eps];
        machine.launch(Kernel("adamw", "adamw"), Grid::reducing(pieces), of_pieces)?;
    }
    Ok(())
}
