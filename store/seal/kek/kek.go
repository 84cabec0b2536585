// Package kek gets key encryption keys from where they are kept, by URI:
//
//	file:///PATH                       a key file of this machine
//	env://NAME                         a variable of the environment, whose value is a key file's content
//	credential://NAME                  a credential that systemd passes, of the same content
//	hcvault://HOST:PORT/MOUNT/keys/KEY transit engine of HashiCorp Vault 1.13 or OpenBao, or later
//	aws-kms://arn:aws:kms:...          AWS KMS
//	gcp-kms://projects/...             Google Cloud KMS
//
// Nothing secret is in a URI. What proves to a key service who asks comes from the
// environment or from files, see [Open].
//
// No error and no message has anything in it that a key service has sent, but for
// codes that are known: it might quote what it was asked.
package kek

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/workspaced/workspaced/store/seal"
)

// What a key service's failure is. Errors of KEKs wrap one of these, or
// [seal.ErrOpen], or are the context's.
var (
	// ErrUnavailable: it may work later, so trying again makes sense. All that is not
	// known to be another one is this.
	ErrUnavailable = errors.New("key service is unavailable")
	// ErrDenied: it does not let us.
	ErrDenied = errors.New("permission denied by key service")
	// ErrNoKey: it has no such key.
	ErrNoKey = errors.New("key service has no such key")
	// ErrRefused: it does not do that, with a key that is disabled, say.
	ErrRefused = errors.New("refused by key service")
)

// failure is one of the errors above, with a sentence for people.
type failure struct {
	kind error
	text string
}

func fail(kind error, format string, args ...any) error {
	return &failure{kind, fmt.Sprintf(format, args...)}
}

func (e *failure) Error() string { return e.text }
func (e *failure) Unwrap() error { return e.kind }

// source is a URI taken apart.
type source struct {
	uri string
	// scheme is one of those in schemes, rest what comes behind "://".
	scheme, rest string
}

type scheme struct {
	form string // what its URIs look like
	rest *regexp.Regexp
	open func(ctx context.Context, s source, create bool) (seal.KEK, error)
	// secrets are the variables of the environment that it takes secrets from.
	secrets func(s source) []string
}

// schemes are by name.
var schemes map[string]scheme

func init() {
	schemes = map[string]scheme{
		"file":       {form: "file:///PATH", rest: regexp.MustCompile(`^/.`), open: openFile},
		"env":        {form: "env://NAME", rest: regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`), open: openEnv, secrets: func(s source) []string { return []string{s.rest} }},
		"credential": {form: "credential://NAME", rest: regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9_.-]*$`), open: openCredential},
		"hcvault": {
			form: "hcvault://HOST:PORT/MOUNT/keys/KEY",
			rest: regexp.MustCompile(`^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:[0-9]+)?(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+/keys/[A-Za-z0-9_-][A-Za-z0-9_.-]*$`),
			open: openVault, secrets: func(source) []string { return []string{envVaultToken} },
		},
		"aws-kms": {
			form: "aws-kms://arn:aws:kms:REGION:ACCOUNT:key/ID",
			rest: regexp.MustCompile(`^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]+:(key|alias)/[A-Za-z0-9/_-]+$`),
			open: openAWS, secrets: func(source) []string { return secretsAWS },
		},
		"gcp-kms": {
			form: "gcp-kms://projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY",
			rest: regexp.MustCompile(`^projects/[A-Za-z0-9.:_-]+/locations/[A-Za-z0-9-]+/keyRings/[A-Za-z0-9_-]+/cryptoKeys/[A-Za-z0-9_-]+$`),
			open: openGCP,
		},
	}
}

const forms = "file:///PATH, env://NAME, credential://NAME, hcvault://HOST:PORT/MOUNT/keys/KEY, aws-kms://ARN, gcp-kms://NAME"

// parse's errors don't quote the URI: there may be a password in it, or it may be a
// key.
func parse(uri string) (source, scheme, error) {
	name, rest, ok := strings.Cut(uri, "://")
	kind, known := schemes[name]
	if !ok || !known {
		return source{}, scheme{}, errors.New("is none of " + forms)
	}
	if u, err := url.Parse(uri); err == nil && u.User != nil {
		return source{}, scheme{}, fmt.Errorf("is no %s: there is a user name or password in it, which have to be elsewhere", kind.form)
	}
	if !kind.rest.MatchString(rest) {
		return source{}, scheme{}, fmt.Errorf("is no %s", kind.form)
	}
	return source{uri, name, rest}, kind, nil
}

// FileURI returns the URI of a key file, whose path is absolute.
func FileURI(path string) string { return "file://" + filepath.Clean(path) }

// Check says what is wrong with a URI, in a part of a sentence that begins with
// "is". It does not quote it, and looks at nothing but the text.
func Check(uri string) error {
	_, _, err := parse(uri)
	return err
}

// Open returns the KEK at a URI. Key services are not asked for anything before the
// KEK is used; then each call has 5 s, and ends with ctx, which therefore has to
// last as long as the KEK is in use.
//
// With create a key file is made if there is none. What else can be wrong: the
// file, the variable or the credential is not there (fs.ErrNotExist), others can
// read it, or it is no keyset; there is nothing to prove to the key service who we
// are.
//
// For hcvault that is a token in VAULT_TOKEN, in the file that VAULT_TOKEN_FILE
// names, or in systemd's credential vault-token. The files are read at each call,
// so they may be renewed. VAULT_CACERT is a PEM file of authorities to trust in
// place of the system's, VAULT_NAMESPACE the namespace. For aws-kms and gcp-kms it
// is what their own programs use, by their own variables and files. HTTPS_PROXY and
// NO_PROXY count for all of them; none follows a redirect, which could send a key
// elsewhere.
func Open(ctx context.Context, uri string, create bool) (seal.KEK, error) {
	s, kind, err := parse(uri)
	if err != nil {
		return nil, fmt.Errorf("key URI %w", err)
	}
	return kind.open(ctx, s, create)
}

// ClearEnv removes from this process's environment the variables that KEKs at these
// URIs have their secrets from, so that what is started from now on does not inherit
// them. Call it when all of them are open. What the kernel shows of this process's
// own environment stays as it was.
func ClearEnv(uris ...string) error {
	var errs []error
	for _, uri := range uris {
		s, kind, err := parse(uri)
		if err != nil || kind.secrets == nil {
			continue
		}
		for _, name := range kind.secrets(s) {
			errs = append(errs, os.Unsetenv(name))
		}
	}
	return errors.Join(errs...)
}
