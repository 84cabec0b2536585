// Package seal encrypts secrets for storage and keeps them out of what is
// printed.
//
// A [Sealer] is an AEAD (AES-256-GCM by Tink) whose keyset lives in a file of
// its own, so that the database without that file is worth nothing. What is
// sealed is bound to its place by associated data, see [AssociatedData]. A
// [Plaintext] is a value on its way between caller, seal and container.
package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
)

// ErrOpen: the sealed bytes, the associated data and the key don't belong
// together. Nothing tells which of them is wrong.
var ErrOpen = errors.New("sealed data can't be opened")

// Overhead is how many bytes sealing adds: Tink's prefix, the nonce, the tag.
const Overhead = 5 + 12 + 16

// Sealer seals and opens. It may be used by many goroutines at once.
type Sealer struct {
	aead tink.AEAD
}

func newSealer(handle *keyset.Handle) (*Sealer, error) {
	primitive, err := aead.New(handle)
	if err != nil {
		return nil, err
	}
	return &Sealer{aead: primitive}, nil
}

// Seal encrypts plain and binds it to the associated data, which has to be
// given again to open it. Sealing twice gives different bytes.
func (s *Sealer) Seal(plain, associated []byte) ([]byte, error) {
	sealed, err := s.aead.Encrypt(plain, associated)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return sealed, nil
}

// Open returns what was sealed, or ErrOpen.
func (s *Sealer) Open(sealed, associated []byte) ([]byte, error) {
	plain, err := s.aead.Decrypt(sealed, associated)
	if err != nil {
		return nil, ErrOpen
	}
	return plain, nil
}

// Format keeps key material out of what prints a Sealer.
func (*Sealer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "seal.Sealer") }

// AssociatedData encodes fields so that no two different lists give the same
// bytes: each one's length comes before it.
func AssociatedData(fields ...string) []byte {
	size := 0
	for _, f := range fields {
		size += binary.MaxVarintLen64 + len(f)
	}
	b := make([]byte, 0, size)
	for _, f := range fields {
		b = binary.AppendUvarint(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}
