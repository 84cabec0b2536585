package kek

import (
	"context"
	"errors"

	"github.com/tink-crypto/tink-go-gcpkms/v2/integration/gcpkms"
	"github.com/tink-crypto/tink-go/v2/tink"
	"google.golang.org/api/option"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/store/seal"
)

type gcpKMS struct{ aead tink.AEADWithContext }

func openGCP(ctx context.Context, s source, _ bool) (seal.KEK, error) {
	return openGCPWith(ctx, s)
}

// openGCPWith lets tests name another server, for which there is no variable.
func openGCPWith(ctx context.Context, s source, options ...option.ClientOption) (seal.KEK, error) {
	aead, err := gcpkms.GetAEADWithContext(ctx, s.uri, gcpkms.WithGoogleAPIClientOptions(options...))
	if err != nil { // it may quote a part of a credentials file
		return nil, errors.New("there are no credentials for Google Cloud, or they are not valid: set GOOGLE_APPLICATION_CREDENTIALS")
	}
	return newService(ctx, "Google Cloud key "+s.uri, &gcpKMS{aead}), nil
}

func (k *gcpKMS) encrypt(ctx context.Context, plain, associated []byte) ([]byte, error) {
	wrapped, err := k.aead.EncryptWithContext(ctx, plain, associated)
	if err != nil {
		return nil, gcpError(err, false)
	}
	return wrapped, nil
}

func (k *gcpKMS) decrypt(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	plain, err := k.aead.DecryptWithContext(ctx, wrapped, associated)
	if err != nil {
		return nil, gcpError(err, true)
	}
	return plain, nil
}

func gcpError(err error, opening bool) error {
	s, ok := status.FromError(err)
	if !ok { // a checksum of the answer is not what it should be
		return errGarbage
	}
	switch code := s.Code(); {
	case code == codes.InvalidArgument && opening:
		return seal.ErrOpen
	case code == codes.NotFound:
		return fail(ErrNoKey, "there is no such key (%v)", code)
	case code == codes.PermissionDenied:
		return fail(ErrDenied, "permission denied (%v): the role roles/cloudkms.cryptoKeyEncrypterDecrypter is needed", code)
	case code == codes.FailedPrecondition:
		return fail(ErrRefused, "the key is disabled, about to be deleted, or of another kind (%v)", code)
	case code == codes.InvalidArgument, code == codes.Unimplemented, code == codes.OutOfRange:
		return fail(ErrRefused, "it refuses (%v)", code)
	case code == codes.Unauthenticated:
		// So says gRPC too when the credentials can't be had now.
		return fail(ErrUnavailable, "the credentials for Google Cloud are not accepted, or can't be had now (%v)", code)
	default:
		return fail(ErrUnavailable, "it fails, or can't be reached (%v)", code)
	}
}
