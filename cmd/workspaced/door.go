package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/loop"
)

// door is who gets in by the sockets.
type door struct {
	authn access.Authenticator
	creds *access.Credentials
	tls   *access.TLS // nil: TCP is not served, or in plain text
}

// newDoor makes what the configuration says of who may do what.
func newDoor(cfg config, log *slog.Logger) (*door, error) {
	gid, err := groupID(cfg.SocketGroup)
	if err != nil {
		return nil, err
	}
	if gid < 0 {
		gid = os.Getegid() // whose the socket is then
	}
	bindings, err := access.ParseBindings(cfg.Bindings, uint32(gid))
	if err != nil {
		return nil, fmt.Errorf("bindings: %w", err)
	}
	d := &door{}
	if cfg.TLSCertFile != "" {
		d.tls, err = access.LoadTLS(access.TLSConfig{
			CertFile: cfg.TLSCertFile, KeyFile: cfg.TLSKeyFile, ClientCAFile: cfg.TLSClientCAFile, Logger: log,
		})
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
	}
	d.creds = access.NewCredentials(access.CredentialsConfig{Bindings: bindings, TLS: d.tls, Insecure: cfg.Insecure, Logger: log})
	return d, nil
}

// certificateInterval is how often the files of certificates are read again: so
// long may an authority count that was taken out of them.
const certificateInterval = 10 * time.Second

// background starts the loops that belong to it.
func (d *door) background(ctx context.Context, loops *loop.Group) {
	loops.Every(ctx, "tokens", access.TendInterval, time.Minute, d.authn.Tend)
	if d.tls == nil {
		return
	}
	// A file that can't be used is an error of this loop: health and metrics say so,
	// and what was loaded before stays in force.
	loops.Every(ctx, "certificates", certificateInterval, 5*time.Second, func(context.Context) error {
		changed, err := d.tls.Reload()
		if changed {
			d.authn.Recheck()
		}
		return err
	})
}

// flush writes when tokens were used last, at the end.
func (d *door) flush(ctx context.Context, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := d.authn.Tokens.Flush(ctx); err != nil {
		log.Warn("when tokens were used last is not written", "error", err)
	}
}
