//go:build !unix

package testserver

import "errors"

func findNATS() (string, error) {
	return "", errors.New("starting nats-server is implemented on Unix only")
}
