package ctrd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	goruntime "runtime"
	"strings"
	"syscall"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"

	"github.com/workspaced/workspaced/runtime"
)

// imageFailure says why an image could not be made present.
func imageFailure(ctx context.Context, ref string, err error) error {
	step := fmt.Sprintf("image %q", ref)
	// gRPC's clock may strike before the context's: what it says of a deadline or
	// of containerd is no word of the registry's.
	if c := code(err); ctx.Err() != nil || c == codes.DeadlineExceeded || c == codes.Canceled || c == codes.Unavailable {
		return failure(ctx, "the pull of "+step, err)
	}
	if known := (*runtime.Error)(nil); errors.As(err, &known) {
		return err
	}
	reason, permanent, cause := imageCause(err)
	if reason == "" {
		return failure(ctx, step, err)
	}
	return &runtime.Error{Reason: reason, Message: step + ": " + cause, Permanent: permanent, Err: err}
}

// imageCause knows the errors of registries and of broken images; the reason is
// empty for others.
func imageCause(err error) (reason runtime.Reason, permanent bool, cause string) {
	var (
		status    remoteerrors.ErrUnexpectedStatus
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		dns       *net.DNSError
		network   net.Error
	)
	const pull = runtime.ReasonImagePullFailed
	switch {
	case mismatch(err):
		return runtime.ReasonImageInvalid, false, "it has no manifest for this machine (linux/" + goruntime.GOARCH + ")"
	case containsAny(err, "image might be filtered out"):
		return runtime.ReasonImageInvalid, false, "there is no image for this machine (linux/" + goruntime.GOARCH + ") in it"
	case errors.As(err, &status):
		cause = fmt.Sprintf("the registry answered %s", statusText(status.StatusCode))
		if status.StatusCode == http.StatusNotFound {
			return runtime.ReasonImageNotFound, false, cause
		}
		return pull, false, cause
	case containsAny(err, "authorization failed", "insufficient_scope", "no basic auth credentials"):
		return pull, false, "the registry refuses access: it does not exist, or needs a login"
	case errors.As(err, &authority):
		return pull, false, "the registry's certificate is not trusted: signed by an unknown authority"
	case errors.As(err, &hostname):
		return pull, false, "the registry's certificate is not trusted: it is for another host"
	case errors.As(err, &invalid):
		return pull, false, "the registry's certificate is not trusted: " + invalid.Error()
	case errors.As(err, &record), containsAny(err, "server gave HTTP response to HTTPS client"):
		return pull, false, "the registry does not speak TLS; list it as plain HTTP if that is meant"
	case errors.As(err, &dns):
		return pull, false, fmt.Sprintf("the registry's name %q can't be resolved", dns.Name)
	case errors.Is(err, syscall.ECONNREFUSED):
		return pull, false, "the registry's host refuses the connection (connection refused)"
	case containsAny(err, "no space left on device"):
		return pull, false, "no space left on the disk for it"
	case unavailable(err):
		return "", false, "" // containerd
	case containsAny(err, "unexpected commit digest", "digest mismatch", "invalid checksum", "failed to extract layer", "failed size validation", "wrong diff id"):
		return runtime.ReasonImageInvalid, false, "its content is damaged: " + short(err)
	case containsAny(err, "cannot unmarshal", "invalid character", "unexpected EOF in archive", "unrecognized image format", "archive/tar", "unsupported media type", "unknown media type", "unexpected media type", "is no longer supported", "invalid media type"):
		return runtime.ReasonImageInvalid, false, short(err)
	case errors.As(err, &network):
		return pull, false, "the connection to the registry failed: " + short(network)
	case errdefs.IsNotFound(err):
		return pull, false, "a part of it is missing in the registry"
	default:
		return pull, false, short(err)
	}
}

func statusText(code int) string {
	return strings.TrimSpace(fmt.Sprintf("HTTP %d %s", code, http.StatusText(code)))
}

// containsAny is for errors that have no type, or lose it on their way through
// containerd.
func containsAny(err error, texts ...string) bool {
	message := err.Error()
	for _, t := range texts {
		if strings.Contains(message, t) {
			return true
		}
	}
	return false
}
