"""Operators that count no MACs, and those whose MACs are not known, each group with its reason.

A test checks that every operator of ONNX and of onnxruntime stands here or has a formula.
"""

from collections.abc import Mapping

from graph_passes.macs.executed_node import Operator

_ONNX, _ML, _ORT = "", "ai.onnx.ml", "com.microsoft"
_BLOCKED, _NHWC = "com.microsoft.nchwc", "com.ms.internal.nhwc"
_PREVIEW, _TRAINING = "ai.onnx.preview", "ai.onnx.preview.training"

_ELEMENTWISE = "element by element: no sum of products"
_MOVES = "moves, selects or makes values"
_REDUCES = "sums or compares, or normalizes"
_POOLS = "pools, samples or resizes"
_LOOKS_UP = "looks up rows of a table"
_TRANSFORMS = "a fixed transform or matrix function: it has no weight"
_QUANTIZES = "rounds and scales"
_BODIES = "the nodes of its bodies count for themselves, once a turn"
_TREES = "follows trees"
_TEXT = "reads text or keys"

_NONE: Mapping[tuple[str, str], str] = {
    (_ONNX, _ELEMENTWISE): """
        Abs Acos Acosh Add Affine And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil
        Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor GRUUnit Gelu Greater GreaterOrEqual HardSigmoid HardSwish
        ImageScaler IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu
        ParametricSoftplus Pow Reciprocal Relu RotaryEmbedding Round Scale ScaledTanh Selu Shrink Sigmoid Sign Sin Sinh
        Softplus Softsign Sqrt Sub Sum SwiGLU Swish Tan Tanh ThresholdedRelu Where Xor""",
    (_ONNX, _MOVES): """
        Bernoulli BitCast Cast CastLike CenterCropPad Col2Im Compress Concat ConcatFromSequence Constant
        ConstantOfShape Crop DepthToSpace Dropout DynamicSlice Expand EyeLike Flatten GivenTensorFill Identity
        ImageDecoder MemcpyFromHost MemcpyToHost Multinomial NonZero OneHot Optional OptionalGetElement
        OptionalHasElement Pad RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reshape
        ReverseSequence Scatter ScatterElements ScatterND SequenceAt SequenceConstruct SequenceEmpty SequenceErase
        SequenceInsert SequenceLength Shape Size Slice SpaceToDepth Split SplitToSequence Squeeze TensorScatter Tile
        Transpose Trilu Unique Unsqueeze""",
    (_ONNX, _REDUCES): """
        ArgMax ArgMin BatchNormalization CumProd CumSum EfficientNMS_TRT GroupNormalization Hardmax
        InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization MeanVarianceNormalization
        NegativeLogLikelihoodLoss NonMaxSuppression RMSNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
        ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare SimplifiedLayerNormalization Softmax
        SoftmaxCrossEntropyLoss TopK""",
    (_ONNX, _POOLS): """
        AffineGrid AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample LpPool MaxPool MaxRoiPool
        MaxUnpool MultilevelCropAndResize_TRT PyramidROIAlign_TRT Resize RoiAlign Upsample""",
    (_ONNX, _LOOKS_UP): "Gather GatherElements GatherND",
    (_ONNX, _TRANSFORMS): "BlackmanWindow DFT Det HammingWindow HannWindow MelWeightMatrix STFT",
    (_ONNX, _QUANTIZES): "DequantizeLinear DynamicQuantizeLinear QuantizeLinear",
    (_ONNX, _BODIES): "If Loop Scan SequenceMap",
    (_ONNX, _TEXT): "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    (_ML, _ELEMENTWISE): "Binarizer Imputer Normalizer Scaler",
    (_ML, _MOVES): "ArrayFeatureExtractor CastMap FeatureVectorizer OneHotEncoder ZipMap",
    (_ML, _TEXT): "CategoryMapper DictVectorizer LabelEncoder",
    (_ML, _TREES): "TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor",
    (_TRAINING, _ELEMENTWISE): "Adagrad Adam Momentum",
    (_ORT, _ELEMENTWISE): """
        BiasAdd BiasDropout BiasGelu BiasSplitGelu BitmaskBiasDropout BitmaskDropout ComplexMul ComplexMulConj
        EngramGate FastGelu GatedAdd Gelu GemmaRotaryEmbedding HyperConnectionPreMix LinearAttentionGate
        MRotaryEmbedding MulInteger QLinearAdd QLinearLeakyRelu QLinearMul QLinearSigmoid QLinearWhere QOrderedGelu
        QuickGelu RotaryEmbedding ScaledSiLU""",
    (_ORT, _MOVES): """
        BifurcationDetector ExpandDims NGramRepeatBlock Pad QLinearConcat Range RemovePadding RestorePadding SampleOp
        Trilu UnfoldTensor Unique""",
    (_ORT, _REDUCES): """
        BiasSoftmax BranchwiseRMSNorm DynamicTimeWarping GatedRMSNorm GroupNorm IsAllFinite QLinearReduceMean
        QLinearSoftmax QOrderedLayerNormalization ReduceSumInteger SkipGroupNorm SkipLayerNormalization
        SkipSimplifiedLayerNormalization""",
    (_ORT, _POOLS): """
        CropAndResize GridSample MaxpoolWithMask NhwcMaxPool QLinearAveragePool QLinearGlobalAveragePool""",
    (_ORT, _LOOKS_UP): """
        EmbedLayerNormalization GatherBlockQuantized GatherND QEmbedLayerNormalization RelativePositionBias
        TorchEmbedding""",
    (_ORT, _TRANSFORMS): "Inverse Irfft Rfft",
    (_ORT, _QUANTIZES): """
        DequantizeBFP DequantizeLinear DequantizeWithOrder QuantizeBFP QuantizeLinear QuantizeWithOrder""",
    (_ORT, _TEXT): "MurmurHash3 NGramHashMapping Tokenizer VarlenNGramHashMapping",
    (_BLOCKED, _POOLS): "AveragePool GlobalAveragePool GlobalMaxPool MaxPool Upsample",
    (_BLOCKED, _MOVES): "ReorderInput ReorderOutput",
    (_NHWC, _POOLS): """
        AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample LpPool MaxPool MaxUnpool QLinearAveragePool
        Resize""",
    (_NHWC, _MOVES): "DepthToSpace SpaceToDepth",
    (_NHWC, _REDUCES): "BatchNormalization InstanceNormalization LRN",
}

_BY_VALUES = "how much it computes depends on the values of its inputs"
_SEARCHES = "it runs its bodies as often as its search goes on"
_COMPILED = "what a compiled or foreign engine does inside cannot be seen"
_NO_FORMULA = "no formula is written for it"

_UNKNOWN: Mapping[tuple[str, str], str] = {
    (_ONNX, _COMPILED): "DisentangledAttention_TRT",
    (_TRAINING, _NO_FORMULA): "Gradient",
    (_ORT, _NO_FORMULA): "GatedDeltaNet",
    (_ORT, _COMPILED): "EPContext Snpe",
    (_ORT, _SEARCHES): "BeamSearch GreedySearch Sampling WhisperBeamSearch",
    (_ORT, _BY_VALUES): """
        DecoderAttention DynamicSparseAttention LongformerAttention PackedSparseAttentionIndexer PagedAttention
        QOrderedLongformerAttention SparseAttention SparseAttentionIndexer SparsePagedAttention SparseToDenseMatMul""",
}


def _by_operator(groups: Mapping[tuple[str, str], str]) -> dict[Operator, str]:
    return {(domain, op_type): reason for (domain, reason), names in groups.items() for op_type in names.split()}


NO_PRODUCTS: Mapping[Operator, str] = _by_operator(_NONE)
"""Operator -> why it counts 0."""

UNKNOWN: Mapping[Operator, str] = _by_operator(_UNKNOWN)
"""Operator -> why its MACs are not known."""
