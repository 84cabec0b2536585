package server

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// admin serves workspace.v1.AdminControl.
type admin struct {
	// A missing RPC does not compile.
	workspacev1.UnsafeAdminControlServer

	server *Server
}

var _ workspacev1.AdminControlServer = admin{}

// GetServerInfo implements workspace.v1.AdminControl.
func (a admin) GetServerInfo(context.Context, *workspacev1.GetServerInfoRequest) (*workspacev1.GetServerInfoResponse, error) {
	return &workspacev1.GetServerInfoResponse{
		Version:     a.server.version,
		DatabaseUid: a.server.store.InstanceUID(),
		StartTime:   timestamppb.New(a.server.started),
	}, nil
}
