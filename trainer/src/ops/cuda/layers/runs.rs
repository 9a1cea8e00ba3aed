//! Passes through the layers, on memory that stays, and their recordings.

use std::sync::atomic::Ordering;

use candle_core::{Result, Shape, Tensor};

use super::super::attention::Attention;
use super::super::attention_tables::Placed;
use super::super::machine::{Address, Element};
use super::super::operator::{Array, Input};
use super::super::recording::{Records, Reserved};
use super::super::rows::{check_ids, select, selected, spread};
use super::super::{Precision, copy, fill_rows, round_to, widen_to};
use super::embedding::{Embedded, Embedder, Found, Sizes};
use super::recorded::{Gathered, Recorded, RecordedEmbedding, RecordedLayer};
use super::stack::{Left, Matrices, Stack, matrices};
use super::{ByEmbedding, EMBEDDING_WEIGHTS, Forward, Gradients, NAME, SEEDS};
use crate::ops::ByRows;

/// How many forward passes there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub passes: u64,
    /// Those that were replayed.
    pub replayed: u64,
    /// Recordings that were made.
    pub recordings: u64,
}

/// All that has to be the same for a recording to do for another pass.
#[derive(Clone, PartialEq)]
struct Use {
    /// Of the embedding, filled up.
    sizes: Sizes,
    /// Rows, filled up, and their width.
    shape: (usize, usize),
    /// Of the attention's tables, filled up.
    lengths: [usize; 3],
    layers: usize,
    heads: usize,
    eps: f32,
    rate: f32,
    precision: Precision,
    first_kept: usize,
    checkpointing: bool,
    input_wanted: bool,
    features_tracked: bool,
    /// Where the weights lie, and whether they are trained.
    weights: Vec<(Address, bool)>,
}

impl Use {
    /// What activations are stored as.
    fn element(&self) -> Element {
        Element::of(self.precision)
    }
}

/// What has been done of a use.
enum Stage<M: Records> {
    /// What is done for the first time is not recorded: it may never be done again, and a device loads kernels when they are first used.
    First,
    /// It was done both ways.
    Done,
    Recorded(Box<Recorded<M>>),
}

struct OneUse<M: Records> {
    used_as: Use,
    /// Tables and seeds of the last pass, the layers' and then the embedding's.
    words: M::Words,
    stage: Stage<M>,
}

/// The forward pass that was done last.
struct Last<M: Records> {
    number: u64,
    /// What it has left, where it was no recording.
    asked: Option<Asked<M>>,
}

/// What the last layer gives, and what backward passes take: of the embedding and of each layer.
type Way<M> = (Array<Reserved<M>>, Embedded<Reserved<M>>, Vec<Left<Reserved<M>>>);

/// Matrices, where it is told how they are rounded, and where features and boxes of the images are copied to.
struct Laid<M: Records> {
    matrices: Matrices<Reserved<M>>,
    pieces: Option<M::Words>,
    images: Option<[Array<Reserved<M>>; 2]>,
}

impl<M: Records> Laid<M> {
    fn images(&self) -> Option<[Input; 2]> {
        self.images.as_ref().map(|both| both.each_ref().map(Array::input))
    }
}

struct Asked<M: Records> {
    result: Array<Reserved<M>>,
    attention: Attention,
    laid: Laid<M>,
    embedded: Embedded<Reserved<M>>,
    left: Vec<Left<Reserved<M>>>,
}

/// Passes on one machine. All of them, recorded or not, take turns on the same memory.
pub struct Engine<M: Records> {
    /// For work that is recorded.
    machine: M,
    memory: Reserved<M>,
    /// Rows that it was for, at most.
    most_rows: usize,
    /// The one that was used last is the last.
    uses: Vec<OneUse<M>>,
    last: Option<Last<M>>,
    counts: Counts,
    /// The machine does not record.
    refuses: bool,
}

impl<M: Records> Engine<M> {
    pub fn new(machine: M) -> Self {
        let memory = Reserved::of(&machine);
        Self { machine, memory, most_rows: 0, uses: Vec::new(), last: None, counts: Counts::default(), refuses: false }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// See [`super::Runs::forward`]. The pass is told its number.
    pub fn forward(&mut self, pass: &Forward) -> Result<()> {
        // What another pass has left is given back.
        self.last = None;
        let (used_as, attention, words) = self.told(pass)?;
        self.make_room(used_as.shape.0);
        let mut one = self.take_out(used_as, &words)?;
        if matches!(one.stage, Stage::Done) && !self.refuses {
            match self.record(pass, &one, &attention) {
                Ok(recorded) => {
                    one.stage = Stage::Recorded(Box::new(recorded));
                    self.counts.recordings += 1;
                }
                Err(error) => {
                    eprintln!("the layers' work could not be recorded as a graph, and is asked for anew each time: {error}");
                    self.refuses = true;
                }
            }
        }
        let number = self.counts.passes;
        let asked = match &one.stage {
            Stage::Recorded(recorded) => {
                self.feed(pass, recorded.images.as_ref())?;
                self.machine.replay(&recorded.forward)?;
                self.counts.replayed += 1;
                None
            }
            _ => {
                let laid = self.laid(pass, &one)?;
                self.feed(pass, laid.images().as_ref())?;
                let (result, embedded, left) = self.ask_forward(pass, &one, &attention, &laid)?;
                Some(Asked { result, attention, laid, embedded, left })
            }
        };
        self.uses.push(one);
        self.counts.passes += 1;
        self.last = Some(Last { number, asked });
        pass.number.store(number, Ordering::Relaxed);
        Ok(())
    }

    /// Does a pass again if it is not the last one, whose results are there.
    fn renew(&mut self, pass: &Forward) -> Result<()> {
        match &self.last {
            Some(last) if last.number == pass.number.load(Ordering::Relaxed) => Ok(()),
            _ => self.forward(pass),
        }
    }

    /// Where the last layer's result of a pass lies.
    fn result(&mut self, pass: &Forward) -> Result<Input> {
        self.renew(pass)?;
        match (&self.last, self.uses.last().map(|one| &one.stage)) {
            (Some(Last { asked: Some(asked), .. }), _) => Ok(asked.result.input()),
            (_, Some(Stage::Recorded(recorded))) => Ok(recorded.result.clone()),
            _ => candle_core::bail!("{NAME}: a pass has left nothing"),
        }
    }

    /// See [`super::Runs::rows`].
    pub fn rows(&mut self, pass: &Forward, ids: &[u32]) -> Result<Tensor> {
        check_ids(ids, pass.rows())?;
        let result = self.result(pass)?;
        let values = selected(&self.machine, &result, ids)?;
        self.machine.tensor(values, &Shape::from((ids.len(), result.matrix().1)))
    }

    /// See [`super::Runs::rows_to`].
    pub fn rows_to(&mut self, pass: &Forward, ids: Address, to: &Input) -> Result<()> {
        let result = self.result(pass)?;
        select(&self.machine, &result, ids, to)
    }

    /// See [`super::Runs::all_rows`].
    pub fn all_rows(&mut self, pass: &Forward) -> Result<Tensor> {
        let result = self.result(pass)?;
        self.read(&result, pass.rows())
    }

    /// See [`super::Runs::backward`].
    pub fn backward(
        &mut self,
        pass: &Forward,
        by_rows: &[ByRows],
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        self.renew(pass)?;
        // From now on, memory of its results is written to.
        let (Some(last), Some(mut one)) = (self.last.take(), self.uses.pop()) else { candle_core::bail!("{NAME}: no pass") };
        let by_embedding = match (&one.stage, last.asked) {
            (Stage::Recorded(recorded), None) => self.replay_backward(pass, recorded, by_rows, complete),
            (_, Some(asked)) => self.ask_backward(pass, &one, asked, by_rows, complete),
            _ => candle_core::bail!("{NAME}: a pass has left nothing"),
        };
        if matches!(one.stage, Stage::First) && by_embedding.is_ok() {
            one.stage = Stage::Done;
        }
        self.uses.push(one);
        by_embedding
    }

    /// Where a pass has more rows than any before, begins with new memory: pieces for fewer rows are of no use to it, and those for it are
    /// large enough for all others. What was recorded is recorded again there.
    fn make_room(&mut self, rows: usize) {
        if rows <= self.most_rows {
            return;
        }
        self.most_rows = rows;
        self.memory = Reserved::of(&self.machine);
        for one in &mut self.uses {
            if matches!(one.stage, Stage::Recorded(_)) {
                one.stage = Stage::Done;
            }
        }
    }

    /// What a pass is used as, its attention, and the words that this is told: tables and seeds.
    fn told(&self, pass: &Forward) -> Result<(Use, Attention, Vec<u32>)> {
        let Forward { embedding, layers, common, .. } = pass;
        let (sizes, of_embedding) = embedding.told(common)?;
        let shape = (sizes.all(), embedding.hidden());
        let heads = (common.heads, shape.1 / common.heads);
        let (attention, tables) =
            Attention::of_plan(&common.plan, shape.0, heads, 1.0 - common.rate, Element::of(common.precision))?;
        let weights = layers.iter().flat_map(|given| &given.weights).chain(&embedding.weights);
        let weights = weights.map(|weight| Ok((self.machine.place(NAME, weight)?.at, weight.track_op())));
        let used_as = Use {
            sizes,
            shape,
            lengths: tables.lengths(),
            layers: layers.len(),
            heads: common.heads,
            eps: common.eps,
            rate: common.rate,
            precision: common.precision,
            first_kept: common.first_kept,
            checkpointing: common.checkpointing,
            input_wanted: pass.input_wanted(),
            features_tracked: embedding.features_tracked(),
            weights: weights.collect::<Result<_>>()?,
        };
        let mut words = tables.words(layers.iter().flat_map(|given| given.seeds));
        words.extend(of_embedding);
        Ok((used_as, attention, words))
    }

    /// The use that is this one, or a new one, with the words where they are read.
    fn take_out(&mut self, used_as: Use, words: &[u32]) -> Result<OneUse<M>> {
        /// Packed batches have a few shapes, filled up as they are. A recording is small: memory is all the uses' together.
        const KEPT: usize = 32;
        if let Some(place) = self.uses.iter().position(|one| one.used_as == used_as) {
            let mut one = self.uses.remove(place);
            self.machine.overwrite(&mut one.words, words)?;
            return Ok(one);
        }
        if self.uses.len() == KEPT {
            self.uses.remove(0);
        }
        Ok(OneUse { used_as, words: self.machine.upload(words)?, stage: Stage::First })
    }

    fn placed(&self, one: &OneUse<M>) -> Placed {
        Placed::at(self.machine.words_at(&one.words), one.used_as.lengths)
    }

    /// The layers of a pass, and the embedding in front of them.
    fn parts<'a>(
        &'a self,
        pass: &'a Forward,
        one: &OneUse<M>,
        attention: &'a Attention,
        laid: &'a Laid<M>,
    ) -> (Embedder<'a, Reserved<M>>, Stack<'a, Reserved<M>>) {
        let placed = self.placed(one);
        let seeds = SEEDS * one.used_as.layers;
        let (of_layers, of_embedding) = laid.matrices.at.split_at(matrices(&pass.layers).count());
        let machine = &self.memory;
        let embedder = Embedder {
            machine,
            common: &pass.common,
            embedding: &pass.embedding,
            sizes: one.used_as.sizes,
            words: placed.seed.after(seeds),
            images: laid.images(),
            matrices: of_embedding,
        };
        (embedder, Stack { machine, common: &pass.common, layers: &pass.layers, attention, matrices: of_layers, placed })
    }

    fn laid(&self, pass: &Forward, one: &OneUse<M>) -> Result<Laid<M>> {
        let element = one.used_as.element();
        let matrices = Matrices::of(&self.memory, matrices(&pass.layers).chain(pass.embedding.matrices()), element)?;
        let pieces = matrices.pieces().map(|pieces| self.machine.upload(pieces)).transpose()?;
        let rows = one.used_as.sizes.images();
        let images = pass.embedding.images.as_ref().map(|[features, boxes]| -> Result<_> {
            let array = |of: &Tensor| Array::empty(&self.memory, (rows, of.dim(1)?), element);
            Ok([array(features)?, array(boxes)?])
        });
        Ok(Laid { matrices, pieces, images: images.transpose()? })
    }

    /// Copies features and boxes of the images to where they are read.
    fn feed(&self, pass: &Forward, images: Option<&[Input; 2]>) -> Result<()> {
        let given = pass.embedding.images.iter().flatten();
        given.zip(images.into_iter().flatten()).try_for_each(|(tensor, to)| self.store(tensor, to))
    }

    /// Memory for rows, with nothing in particular in it.
    fn empty(&self, one: &OneUse<M>) -> Result<Array<Reserved<M>>> {
        Array::empty(&self.memory, one.used_as.shape, one.used_as.element())
    }

    /// What the last layer gives, and what backward passes take.
    fn ask_forward(&self, pass: &Forward, one: &OneUse<M>, attention: &Attention, laid: &Laid<M>) -> Result<Way<M>> {
        let pieces = laid.pieces.as_ref().map_or(Address::NULL, |words| self.machine.words_at(words));
        laid.matrices.round(&self.memory, pieces)?;
        let (embedder, stack) = self.parts(pass, one, attention, laid);
        let input = self.empty(one)?;
        let embedded = embedder.forward(&input.input())?;
        let (result, left) = stack.forward(input)?;
        Ok((result, embedded, left))
    }

    fn ask_backward(
        &self,
        pass: &Forward,
        one: &OneUse<M>,
        asked: Asked<M>,
        by_rows: &[ByRows],
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        let Asked { result, attention, laid, embedded, left } = asked;
        drop(result);
        let (embedder, stack) = self.parts(pass, one, &attention, &laid);
        let mut by = self.empty(one)?;
        self.spread(by_rows, &by.input())?;
        for of_layer in left.into_iter().rev() {
            let (number, wanted) = (of_layer.number, goes_on(pass, of_layer.number));
            let (by_input, by_weights) = stack.backward(of_layer, by, wanted)?;
            complete(number, Gathered::of(&self.machine, &by_weights)?.copied(&self.machine, &pass.layers[number].weights)?)?;
            drop(by_weights);
            let Some(by_input) = by_input else { return Ok(None) };
            by = by_input;
        }
        let (by_weights, features) = embedder.backward(embedded, &by.input())?;
        let gathered = Gathered::of(&self.machine, &by_weights)?;
        self.by_embedding(pass, &gathered, features.as_ref().map(Array::input).as_ref()).map(Some)
    }

    fn replay_backward(
        &self,
        pass: &Forward,
        recorded: &Recorded<M>,
        by_rows: &[ByRows],
        complete: &mut dyn FnMut(usize, Gradients) -> Result<()>,
    ) -> Result<Option<ByEmbedding>> {
        self.spread(by_rows, &recorded.by_result)?;
        for RecordedLayer { number, backward, gathered } in &recorded.backward {
            self.machine.replay(backward)?;
            complete(*number, gathered.copied(&self.machine, &pass.layers[*number].weights)?)?;
        }
        let Some(RecordedEmbedding { backward, gathered, features }) = &recorded.by_embedding else { return Ok(None) };
        self.machine.replay(backward)?;
        self.by_embedding(pass, gathered, features.as_ref()).map(Some)
    }

    /// Gradients as tensors.
    fn by_embedding(&self, pass: &Forward, gathered: &Gathered<M>, features: Option<&Input>) -> Result<ByEmbedding> {
        let weights: [_; EMBEDDING_WEIGHTS.len()] = gathered.copied(&self.machine, &pass.embedding.weights)?;
        let features = features.map(|of| self.read(of, pass.embedding.image_rows()?)).transpose()?;
        Ok(ByEmbedding { weights, features })
    }

    /// Records a pass both ways. All memory is given back then: nobody else writes to it while the recordings are done.
    fn record(&self, pass: &Forward, one: &OneUse<M>, attention: &Attention) -> Result<Recorded<M>> {
        let laid = self.laid(pass, one)?;
        let ((y, embedded, left), forward) = self.machine.record(|| self.ask_forward(pass, one, attention, &laid))?;
        let (embedder, stack) = self.parts(pass, one, attention, &laid);
        // The result is read before the gradient by it is written.
        let result = y.input();
        drop(y);
        let mut by = Some(self.empty(one)?);
        let by_result = by.as_ref().map(Array::input);
        let mut backward = Vec::new();
        for of_layer in left.into_iter().rev() {
            let (number, wanted) = (of_layer.number, goes_on(pass, of_layer.number));
            let Some(gradient) = by.take() else { candle_core::bail!("{NAME}: a layer without a gradient") };
            let ((by_input, by_weights), recording) = self.machine.record(|| stack.backward(of_layer, gradient, wanted))?;
            let gathered = Gathered::of(&self.machine, &by_weights)?;
            backward.push(RecordedLayer { number, backward: recording, gathered });
            by = by_input;
        }
        let Some(by_result) = by_result else { candle_core::bail!("{NAME}: no gradient") };
        let by_embedding = by.map(|by| -> Result<_> {
            let ((by_weights, features), backward): (Found<_>, _) =
                self.machine.record(|| embedder.backward(embedded, &by.input()))?;
            let features = features.as_ref().map(Array::input);
            Ok(RecordedEmbedding { backward, gathered: Gathered::of(&self.machine, &by_weights)?, features })
        });
        let by_embedding = by_embedding.transpose()?;
        Ok(Recorded { images: laid.images(), result, by_result, forward, backward, by_embedding, _pieces: laid.pieces })
    }

    /// Stores the gradient by all of a pass's results, of those by some of their rows.
    fn spread(&self, by_rows: &[ByRows], to: &Input) -> Result<()> {
        let mut chosen = Vec::new();
        for (ids, gradient) in by_rows {
            chosen.push((&ids[..], self.machine.place(NAME, gradient)?.at));
        }
        spread(&self.machine, &chosen, to)
    }

    /// Stores a contiguous f32 tensor as the first rows of an array, whose other rows become zeros.
    fn store(&self, tensor: &Tensor, to: &Input) -> Result<()> {
        let from = self.machine.place(NAME, tensor)?;
        match to.element {
            Element::F32 => copy(&self.machine, from.at, to.at, from.count())?,
            Element::Bf16 => round_to(&self.machine, from.at, to.at, from.count())?,
        }
        let ((rows, width), (stored, _)) = (to.matrix(), from.matrix());
        if stored == rows {
            return Ok(());
        }
        let behind = to.element.after(to.at, stored * width);
        fill_rows(&self.machine, Address::NULL, behind, to.element, rows - stored, width)
    }

    /// An array's first rows, in f32.
    fn read(&self, from: &Input, rows: usize) -> Result<Tensor> {
        let shape = Shape::from((rows, from.matrix().1));
        let values = self.machine.allocate(shape.elem_count())?;
        let to = self.machine.at(&values);
        match from.element {
            Element::F32 => copy(&self.machine, from.at, to, shape.elem_count())?,
            Element::Bf16 => widen_to(&self.machine, from.at, to, shape.elem_count())?,
        }
        self.machine.tensor(values, &shape)
    }
}

/// Whether a gradient by a layer's input leads anywhere.
fn goes_on(pass: &Forward, layer: usize) -> bool {
    layer > pass.common.first_kept || pass.input_wanted()
}
