package ctrd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

// Registries says how registries are reached. The zero value is right for
// public ones: HTTPS, certificates of the system's authorities, no login; a
// registry on this machine's loopback that does not speak TLS is reached over
// plain HTTP.
type Registries struct {
	// PlainHTTP are hosts, `name[:port]`, that are reached over plain HTTP.
	PlainHTTP []string
	// CAFiles are PEM files of authorities that are trusted beside the system's.
	CAFiles []string
	// CertsDir is a directory in containerd's certs.d layout; what it says of a
	// host (mirrors, certificates) comes before the rest. Empty: none.
	CertsDir string
}

func (r Registries) validate() error {
	if r.CertsDir != "" && !filepath.IsAbs(r.CertsDir) {
		return fmt.Errorf("registries: certs.d directory %q is not an absolute path", r.CertsDir)
	}
	_, err := r.tlsConfig()
	return err
}

// tlsConfig is nil when there is nothing special. The files are read at each
// pull, so that a renewed authority needs no restart.
func (r Registries) tlsConfig() (*tls.Config, error) {
	if len(r.CAFiles) == 0 {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, file := range r.CAFiles {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("registries: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("registries: no certificate in %s", file)
		}
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// resolver makes one for a pull.
func (r Registries) resolver(ctx context.Context) (remotes.Resolver, error) {
	tlsConfig, err := r.tlsConfig()
	if err != nil {
		return nil, err
	}
	// The scheme is said explicitly: by default the client does not verify the
	// certificates of a registry on the loopback.
	options := config.HostOptions{DefaultTLS: tlsConfig, DefaultScheme: "https"}
	if r.CertsDir != "" {
		options.HostDir = config.HostDirFromRoot(r.CertsDir)
	}
	secure := config.ConfigureHosts(ctx, options)
	options.DefaultScheme, options.DefaultTLS = "http", nil
	plain := config.ConfigureHosts(ctx, options)
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: func(host string) ([]docker.RegistryHost, error) {
			if slices.Contains(r.PlainHTTP, host) {
				return plain(host)
			}
			hosts, err := secure(host)
			if err == nil && docker.IsLocalhost(host) {
				for _, h := range hosts {
					h.Client.Transport = docker.NewHTTPFallback(h.Client.Transport)
				}
			}
			return hosts, err
		},
	}), nil
}
