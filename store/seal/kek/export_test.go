package kek

import (
	"context"
	"time"

	"google.golang.org/api/option"

	"github.com/workspaced/workspaced/store/seal"
)

// WithTimeout returns the same key service's KEK with less patience.
func WithTimeout(key seal.KEK, d time.Duration) seal.KEK {
	s := *key.(*service)
	s.timeout = d
	return &s
}

// OpenGCP opens a key of another server than Google's.
func OpenGCP(ctx context.Context, uri string, options ...option.ClientOption) (seal.KEK, error) {
	s, _, err := parse(uri)
	if err != nil {
		return nil, err
	}
	return openGCPWith(ctx, s, options...)
}

// VaultError is what a recorded answer comes to.
func VaultError(status int, texts []string) error {
	return vaultError(status, "transit/decrypt/k", texts)
}
