package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/workspaced/workspaced/server/access"
)

// newDoor makes the credentials of the sockets, from what the configuration says
// of who may do what.
func newDoor(cfg config, log *slog.Logger) (*access.Credentials, error) {
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
	return access.NewCredentials(access.CredentialsConfig{Bindings: bindings, Insecure: cfg.Insecure, Logger: log}), nil
}
