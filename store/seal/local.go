package seal

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
)

// Local is a KEK that this machine keeps: in a file, see [Load], or wherever
// [Parse] got it from. It is a Tink keyset of AEAD keys in plain JSON.
type Local struct {
	name   string
	handle *keyset.Handle
	aead   tink.AEAD
}

var _ KEK = (*Local)(nil)

// NewLocal makes a key and returns it as Parse and the key file have it.
func NewLocal() ([]byte, error) {
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := insecurecleartextkeyset.Write(handle, keyset.NewJSONWriter(&b)); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Parse reads a key from anywhere. The name says from where, in errors; they say
// nothing of what was read.
func Parse(name string, b []byte) (*Local, error) { return parseLocal(name, b) }

func parseLocal(name string, b []byte) (*Local, error) {
	// The inner error is left out: it might quote the key.
	handle, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(bytes.NewReader(b)))
	if err != nil || len(b) > maxKeyFileBytes {
		return nil, fmt.Errorf("%s holds no keyset: restore it from a backup", name)
	}
	primitive, err := aead.New(handle)
	if err != nil {
		return nil, fmt.Errorf("%s holds a keyset of another kind than AEAD", name)
	}
	return &Local{name: name, handle: handle, aead: primitive}, nil
}

// Name implements KEK.
func (l *Local) Name() string { return l.name }

// EncryptWithContext implements KEK.
func (l *Local) EncryptWithContext(_ context.Context, plain, associated []byte) ([]byte, error) {
	return l.aead.Encrypt(plain, associated)
}

// DecryptWithContext implements KEK.
func (l *Local) DecryptWithContext(_ context.Context, wrapped, associated []byte) ([]byte, error) {
	plain, err := l.aead.Decrypt(wrapped, associated)
	if err != nil {
		return nil, ErrOpen
	}
	return plain, nil
}

// Format keeps key material out of what prints a Local.
func (l *Local) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "seal.Local") }
