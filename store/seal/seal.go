// Package seal encrypts secrets for storage and keeps them out of what is
// printed.
//
// A [Sealer] is an AEAD (AES-256-GCM by Tink) over data keys. Those are stored in
// the database, wrapped by a [KEK] that is kept elsewhere, see [Wrapped]: the
// database without it is worth nothing. What is sealed is bound to its place by
// associated data, see [AssociatedData]. A [Plaintext] is a value on its way
// between caller, seal and container.
package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
)

// ErrOpen: the sealed bytes, the associated data and the key don't belong
// together. Nothing tells which of them is wrong.
var ErrOpen = errors.New("sealed data can't be opened")

// Overhead is how many bytes sealing adds: Tink's prefix, the nonce, the tag.
const Overhead = prefixBytes + 12 + 16

// prefixBytes is the length of what tells the key: a 1, and the key's id.
const prefixBytes = 5

// Sealer seals with the newest data key and opens what any of them has sealed. It
// may be used by many goroutines at once.
type Sealer struct {
	keys atomic.Pointer[dataKeys]
}

// dataKeys never change.
type dataKeys struct {
	handle  *keyset.Handle
	aead    tink.AEAD
	primary uint32
	// former are those before the last retirement: they still open, for who reads
	// what was there before, see Forget.
	former *dataKeys
}

func (k *dataKeys) open(sealed, associated []byte) (plain []byte, err error) {
	for ; k != nil; k = k.former {
		if plain, err = k.aead.Decrypt(sealed, associated); err == nil {
			return plain, nil
		}
	}
	return nil, ErrOpen
}

func newDataKeys(handle *keyset.Handle) (*dataKeys, error) {
	primitive, err := aead.New(handle)
	if err != nil {
		return nil, err
	}
	primary, err := handle.Primary()
	if err != nil {
		return nil, err
	}
	return &dataKeys{handle: handle, aead: primitive, primary: primary.KeyID()}, nil
}

func newSealer(handle *keyset.Handle) (*Sealer, error) {
	keys, err := newDataKeys(handle)
	if err != nil {
		return nil, err
	}
	s := &Sealer{}
	s.keys.Store(keys)
	return s, nil
}

// Seal encrypts plain and binds it to the associated data, which has to be
// given again to open it. Sealing twice gives different bytes.
func (s *Sealer) Seal(plain, associated []byte) ([]byte, error) {
	sealed, err := s.keys.Load().aead.Encrypt(plain, associated)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return sealed, nil
}

// Open returns what was sealed, or ErrOpen.
func (s *Sealer) Open(sealed, associated []byte) ([]byte, error) {
	return s.keys.Load().open(sealed, associated)
}

// Primary returns the id of the key that seals.
func (s *Sealer) Primary() uint32 { return s.keys.Load().primary }

// KeyIDs returns the ids of all data keys, oldest first: the last one seals.
func (s *Sealer) KeyIDs() []uint32 {
	handle := s.keys.Load().handle
	ids := make([]uint32, 0, handle.Len())
	for i := range handle.Len() {
		if entry, err := handle.Entry(i); err == nil { // i is in range
			ids = append(ids, entry.KeyID())
		}
	}
	return ids
}

// KeyID returns the id of the key that something was sealed with, without opening
// it; false when it was not sealed.
func KeyID(sealed []byte) (id uint32, ok bool) {
	if len(sealed) < Overhead || sealed[0] != 1 {
		return 0, false
	}
	return binary.BigEndian.Uint32(sealed[1:prefixBytes]), true
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
