// A dropout mask that is drawn among products: the vector units have time while tiles multiply.
// Included by isa_amx.cpp after its target pragma, inside its anonymous namespace.
#pragma once

// The bits of dropout_bits, 64 columns of a row at a time.
class Drawing {
 public:
  static constexpr int64_t kMostCols = 640, kCols = 64;

  // After the mask before is finished.
  void start(const Dropout& dropout, RowIndex index, Range rows, Range cols, MaskBits to) {
    finish();
    const int64_t first_col = dropout.col_offset + cols.begin;
    if (first_col % 32 != 0) {  // such words are of two draws
      dropout_bits<AmxDropout>(dropout, index, rows, cols, to.words, to.pitch);
      return;
    }
    dropout_ = dropout, index_ = index, rows_ = rows, to_ = to, keys_ = DropoutKeys(dropout.seed);
    words_ = (cols.end - cols.begin + 31) / 32, word_ = 0;
    const auto group = static_cast<uint32_t>(first_col / 32 * 4);
    for (int64_t i = 0; i < round_up(words_, 2) * 4; ++i) {
      products_[i] = uint64_t{philox::kMul0} * ((group + static_cast<uint32_t>(i)) ^ keys_.k0[0]);
    }
  }
  bool is_done() const { return rows_.begin >= rows_.end; }
  int64_t left() const { return (rows_.end - rows_.begin) * ((words_ + 1) / 2); }
  void one() {
    if (word_ == 0) {
      row_ = DropoutRow(static_cast<uint64_t>(dropout_.mask_row(index_[rows_.begin])), keys_);
    }
    uint32_t drawn[2];
    avx512_dropout_words(products_ + word_ * 4, row_, keys_, dropout_.keep_count, drawn);
    to_.words[word_] = drawn[0];
    if (word_ + 1 < words_) to_.words[word_ + 1] = drawn[1];
    word_ += 2;
    if (word_ >= words_) word_ = 0, ++rows_.begin, to_.words += to_.pitch;
  }
  void finish() {
    while (!is_done()) one();
  }

 private:
  Dropout dropout_;
  RowIndex index_;
  Range rows_{0, 0};
  MaskBits to_;
  int64_t words_ = 0, word_ = 0;
  DropoutKeys keys_{0};
  DropoutRow row_{0, keys_};
  uint64_t products_[kMostCols / 8];
};
