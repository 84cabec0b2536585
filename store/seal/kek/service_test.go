package kek

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// forgetful is a key service that leaves associated data out, as Vault before 1.13
// does.
type forgetful struct{}

func (forgetful) encrypt(_ context.Context, plain, _ []byte) ([]byte, error) {
	return append([]byte("wrapped "), plain...), nil
}

func (forgetful) decrypt(_ context.Context, wrapped, _ []byte) ([]byte, error) {
	return bytes.TrimPrefix(wrapped, []byte("wrapped ")), nil
}

// What is wrapped by a service that does not bind it to its database is not relied on.
func TestService_BindsWhatItWraps(t *testing.T) {
	s := newService(t.Context(), "a test", forgetful{})
	if wrapped, err := s.EncryptWithContext(t.Context(), []byte("plain"), []byte("database")); !errors.Is(err, ErrRefused) || wrapped != nil {
		t.Errorf("got %q, %v", wrapped, err)
	}
}
