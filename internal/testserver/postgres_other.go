//go:build !unix

package testserver

import "errors"

func findPostgres() (string, error) {
	return "", errors.New("starting PostgreSQL is implemented on Unix only")
}
