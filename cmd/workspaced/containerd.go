package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/workspaced/workspaced/cmd/workspaced/internal/embedded"
	"github.com/workspaced/workspaced/runtime/ctrd"
)

// usesPrivate is what addressFile holds instead of an address.
const usesPrivate = "private"

// addressFile remembers which containerd has the containers of this data
// directory. Without it a containerd that somebody installs later, or one that
// is not up yet, would change which one is used, and every workspace would run
// twice.
func addressFile(cfg config) string { return filepath.Join(cfg.DataDir, "containerd.address") }

// usedContainerd returns what addressFile remembers; empty: nothing.
func usedContainerd(cfg config) (string, error) {
	text, err := os.ReadFile(addressFile(cfg))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

// containerdTimeout is how long a containerd that is not ours has to answer: at
// boot it may come up after us.
const containerdTimeout = 10 * time.Second

// findContainerd returns the address of the containerd to use: the one that is
// configured, else the one that was used before, else the machine's own, else a
// private one, which it starts and which the caller has to close.
func findContainerd(ctx context.Context, cfg config, log *slog.Logger) (string, *embedded.Containerd, error) {
	used, err := usedContainerd(cfg)
	if err != nil {
		return "", nil, err
	}
	choice := used
	switch {
	case cfg.Containerd != "":
		choice = cfg.Containerd
	case cfg.PrivateContainerd:
		choice = usesPrivate
	case used != "":
	case embedded.Answers(ctx, defaultContainerd):
		choice = defaultContainerd
	default:
		choice = usesPrivate
	}
	if used != "" && choice != used {
		log.Warn("another containerd than before: containers that run there go on running", "before", used, "now", choice)
	}

	var private *embedded.Containerd
	address := choice
	if choice == usesPrivate {
		if private, err = embedded.Start(ctx, privateContainerd(cfg, log)); err != nil {
			return "", nil, err
		}
		address = private.Address()
	} else {
		log.Info("waiting for containerd", "address", address, "timeout", containerdTimeout)
		wait, cancel := context.WithTimeout(ctx, containerdTimeout)
		defer cancel()
		if err := embedded.WaitReady(wait, address); err != nil {
			return "", nil, fmt.Errorf("containerd: %w", err)
		}
		log.Info("using containerd", "address", address)
	}
	if choice != used {
		if err := writeFile(addressFile(cfg), choice+"\n"); err != nil {
			if private != nil {
				private.Close(ctx)
			}
			return "", nil, err
		}
	}
	return address, private, nil
}

// writeFile replaces the file as a whole, durably.
func writeFile(path, text string) (err error) {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func privateContainerd(cfg config, log *slog.Logger) embedded.Config {
	return embedded.Config{
		Binary:  cfg.ContainerdBinary,
		Root:    filepath.Join(cfg.DataDir, "containerd"),
		State:   filepath.Join(cfg.StateDir, "containerd"),
		LogFile: filepath.Join(cfg.DataDir, "containerd.log"),
		Logger:  log,
	}
}

// openDriver connects to containerd.
func openDriver(ctx context.Context, cfg config, address, instanceUID string, log *slog.Logger) (*ctrd.Driver, error) {
	init, err := cfg.initProgram()
	if err != nil {
		return nil, err
	}
	return ctrd.New(ctx, ctrd.Config{
		Address:       address,
		Namespace:     cfg.ContainerdNamespace,
		InstanceUID:   instanceUID,
		StateDir:      cfg.StateDir,
		DataDir:       cfg.DataDir,
		InitPath:      init,
		APIDir:        cfg.apiDir(),
		RuntimeBinary: cfg.RuntimeBinary,
		Registries: ctrd.Registries{
			PlainHTTP: cfg.PlainHTTPRegistries,
			CAFiles:   cfg.RegistryCAFiles,
			CertsDir:  cfg.RegistryCertsDir,
		},
		Policy: cfg.policy(),
		Around: faultPoints(),
		Logger: log,
	})
}
